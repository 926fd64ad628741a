"""What all tests share: the repository on sys.path, and the real data where they are."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def test_data():
    """Folder of real images: $LDM_TEST_DATA, else ../shared/data from the project's root."""
    folder = Path(os.environ.get("LDM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set LDM_TEST_DATA")
    return folder
