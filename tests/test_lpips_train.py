"""LPIPS against published values and the package `lpips`, then its training: resume, ranks, faults, wrong settings."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, Run, assert_same, numbers, read
from PIL import Image

from checkpoint import UserError, part
from data.bapps import prepare as bapps
from lpips_train import LPIPS, TAPS, Judgements, average_precision, load_heads, make_trunk, two_afc

NETS = ("vgg", "alex", "squeeze")


@pytest.fixture(scope="session")
def trunks(tmp_path_factory):
    """{net: a file of random weights, the `features` of torchvision's model alone}."""
    folder, files = tmp_path_factory.mktemp("trunks"), {}
    torch.manual_seed(0)
    for net in NETS:
        files[net] = f"{folder}/{net}.pth"
        state = make_trunk(net).state_dict()
        for name, t in state.items():
            t.normal_(0, (2 / t[0].numel()) ** 0.5 if name.endswith("weight") else 0.1)
        torch.save(state, files[net])
    return files


@pytest.fixture
def assets(test_data):
    if not (test_data / "assets/squeezenet1_1_features.pth").exists():
        pytest.skip(f"no model assets at {test_data}/assets: set LDM_TEST_DATA")
    return test_data / "assets"


def error(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the metric ---


def test_golden_values(assets):
    """Of torchmetrics' example and of the authors' example images, with the published weights."""
    lpips = LPIPS("squeeze", assets / "squeezenet1_1_features.pth", assets / "lpips_v0.1_squeeze.pth")
    torch.manual_seed(123)
    x, y = torch.rand(10, 3, 100, 100) * 2 - 1, torch.rand(10, 3, 100, 100) * 2 - 1
    assert lpips(x, y).shape == (10,) and lpips(x, y).mean().item() == pytest.approx(0.1008, abs=1e-3)
    images = [np.array(Image.open(assets / f"lpips_ex_{n}.png").convert("RGB")) for n in ("ref", "p0", "p1")]
    ref, p0, p1 = (torch.from_numpy(a).permute(2, 0, 1)[None] / 127.5 - 1 for a in images)
    assert lpips(ref, p0).item() == pytest.approx(0.7110, abs=1e-3)
    assert lpips(ref, p1).item() == pytest.approx(0.1479, abs=1e-3)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.filterwarnings("ignore")  # torchvision's, about the package's use of it
def test_equals_the_package_in_value_and_gradient(net, lpips_package, tmp_path):
    """Its random trunk, saved as torchvision saves whole models, and the heads that it has with it."""
    torch.manual_seed(0)
    theirs = lpips_package.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    state = {f"features.{name.split('.', 1)[1]}": t for name, t in theirs.net.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(2)}, tmp_path / "whole.pth")
    ours = LPIPS(net, tmp_path / "whole.pth")
    x = torch.rand(2, 3, 64, 80) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    x.requires_grad_(), y.requires_grad_()
    values = [theirs(x, y).flatten(), ours(x, y)]
    assert values[0].min() > 0.005
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(v.sum(), (x, y)) for v in values]
    for a, b in zip(*gradients):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_published_heads_are_read_without_importing_their_package():
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("no package lpips: pip install -r requirements.txt")
    code = "import sys, lpips_train as l; print([len(l.load_heads(n)[0]) for n in l.TAPS], {'lpips', 'torchvision'}"
    done = subprocess.run(
        [sys.executable, "-c", code + " & set(sys.modules))"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[5, 5, 7] set()\n", done.stderr


def test_nothing_is_random_or_trained_whatever_the_parents_mode(trunks):
    parent = torch.nn.Module()
    parent.lpips = LPIPS("squeeze", trunks["squeeze"], "uniform")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    before = parent.lpips(x, y)
    parent.train()
    assert not any(m.training for m in parent.lpips.modules()) and torch.equal(parent.lpips(x, y), before)
    assert not any(p.requires_grad for p in parent.lpips.parameters())


@pytest.mark.parametrize("net", NETS)
def test_gradients_are_finite_and_distances_never_negative(net, trunks):
    lpips = LPIPS(net, trunks[net], "uniform")
    dark = torch.full((1, 3, 32, 32), -1.0)
    random = torch.rand(1, 3, 32, 32) * 2 - 1
    for a, b in ((dark, dark), (0 * dark, 0 * dark), (dark, -dark), (random, random), (random, dark)):
        x = a.clone().requires_grad_()
        distance = lpips(x, b)
        distance.sum().backward()
        assert x.grad.isfinite().all() and distance.item() >= 0
        assert (distance.item() == 0) == torch.equal(a, b)
    with torch.no_grad():
        for p in lpips.trunk.parameters():
            p.zero_()  # all channels 0 everywhere: the root's own gradient would be infinite
    x = random.clone().requires_grad_()
    lpips(x, dark).sum().backward()
    assert x.grad.isfinite().all()


def test_gray_is_repeated_and_rgba_is_put_on_white(trunks):
    lpips, x, y = LPIPS("squeeze", trunks["squeeze"], "uniform"), *torch.rand(2, 2, 4, 32, 32).mul(2).sub(1)
    assert torch.equal(lpips(x[:, :1], y[:, :1]), lpips(*(a[:, :1].repeat(1, 3, 1, 1) for a in (x, y))))
    on_white = (1 - (1 - a[:, :3]) * (1 + a[:, 3:]) / 2 for a in (x, y))
    torch.testing.assert_close(lpips(x, y), lpips(*on_white))
    clear = x.clone()
    clear[:, 3] = -1
    assert (lpips(clear, -clear * torch.tensor([1, 1, 1, -1]).view(4, 1, 1)) == 0).all(), "colors that do not show"


def test_precision(trunks):
    lpips, (x, y) = LPIPS("squeeze", trunks["squeeze"], "uniform"), torch.rand(2, 2, 3, 17, 50) * 2 - 1
    single = lpips(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        distance = lpips(x, y)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, single, rtol=0.03, atol=0)
    assert torch.equal(lpips(x.double(), y.double()), single)
    torch.testing.assert_close(lpips(x.half(), y.half()), single, rtol=0.03, atol=0)
    torch.testing.assert_close(lpips((x + 1) / 2, (y + 1) / 2, normalize=True), single, rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError, match="LPIPS of torch.uint8 images: scale them to"):
        lpips(x.byte(), y.byte())
    torch.testing.assert_close(lpips.double()(x.double(), y.double()), single.double(), rtol=1e-4, atol=1e-6)


def test_bad_weights_are_named(trunks, tmp_path, monkeypatch):
    def saved(tensors):
        torch.save(tensors, tmp_path / "bad.pth")
        return tmp_path / "bad.pth"

    with pytest.raises(AssertionError, match="net='vgg19' must be one of vgg, alex, squeeze"):
        LPIPS("vgg19")
    # trunks
    message = error(LPIPS, "alex", trunks["squeeze"], "uniform")
    assert "0.weight is (64, 3, 3, 3), alex needs (64, 3, 11, 11); give alex's weights, or set another net" in message
    message = error(LPIPS, "vgg", saved({"0.weight": torch.zeros(64, 3, 3, 3)}), "uniform")
    assert "0.bias is missing, vgg needs (64,)" in message
    assert "bad.pth: no tensors by name" in error(LPIPS, "vgg", saved([1, 2]), "uniform")
    assert "nowhere.pth: no such file" in error(LPIPS, "vgg", "nowhere.pth", "uniform")
    (tmp_path / "text.pth").write_text("hello")
    assert "text.pth: not a checkpoint" in error(LPIPS, "vgg", tmp_path / "text.pth", "uniform")

    def fetch(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    message = error(LPIPS, "vgg", None, "uniform")
    assert "pytorch.org/models/vgg16-397923af.pth: could not be fetched (OSError: no network); down" in message
    # heads
    heads = {f"lin{k}.model.1.weight": torch.ones(1, c, 1, 1) for k, c in enumerate(TAPS["alex"].values())}
    assert load_heads("alex", saved(heads))[0][1].shape == (192,)
    message = error(LPIPS, "squeeze", trunks["squeeze"], saved(heads))
    assert "LPIPS heads of [64, 192, 384, 256, 256] channels, squeeze needs [64, 128, 256, " in message
    heads["lin1.model.1.weight"][0, 5] = -0.25
    assert "a head has a weight below 0" in error(load_heads, "alex", saved(heads))
    assert "LPIPS heads of [0, 0" in error(load_heads, "squeeze", trunks["squeeze"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install lpips" in error(load_heads, "squeeze", None)


# --- scores ---


def test_two_afc_is_the_published_sum():
    d0, d1 = torch.tensor([0.1, 0.3, 0.2, 0.5]), torch.tensor([0.2, 0.1, 0.2, 0.4])
    h = torch.tensor([0.2, 1.0, 0.8, 0.0])
    want = ((d0 < d1) * (1 - h) + (d1 < d0) * h + 0.5 * (d0 == d1)).mean()
    assert two_afc(torch.stack([d0, d1], dim=1), h).item() == pytest.approx(want.item()) == (0.8 + 1 + 0.5 + 0) / 4


def test_average_precision_by_hand():
    def ap(distances, same):
        return average_precision(torch.tensor(distances)[:, None], torch.tensor(same)).item()

    assert ap([0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 0.0, 0.0]) == pytest.approx(1)
    assert ap([0.4, 0.3, 0.2, 0.1], [1.0, 1.0, 0.0, 0.0]) == pytest.approx(0.5)  # 2 hits of 4 at full recall
    # hits at 1, 3, 4: precision 1, 2/3, 3/4; the envelope lifts the second to 3/4
    assert ap([0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 1.0, 1.0]) == pytest.approx((1 + 0.75 + 0.75) / 3)
    # shares of people are shares of hits: 0.5, then 1.5 of 2
    assert ap([0.1, 0.2], [0.5, 1.0]) == pytest.approx(0.75)


# --- real training runs ---


def make_judgements(path, size=20):
    """A small set as data/bapps/prepare.py leaves it: noise, less of it is better."""
    rng = np.random.default_rng(0)
    for task, split, category, count in (
        ("2afc", "train", "noise", 14),
        ("2afc", "train", "more", 10),
        ("2afc", "val", "noise", 9),
        ("2afc", "val", "more", 5),
        ("jnd", "val", "noise", 6),
    ):
        folder = path / task / split / category
        folder.mkdir(parents=True)
        ref = rng.uniform(60, 190, (count, 1, size, size, 3))
        sigma = rng.uniform(1, 60, (count, 2 if task == "2afc" else 1))
        noisy = ref + sigma[..., None, None, None] * rng.standard_normal((*sigma.shape, size, size, 3))
        np.save(folder / "images.npy", np.concatenate([ref, noisy], axis=1).clip(0, 255).astype(np.uint8))
        judge = sigma[:, 1] < sigma[:, 0] if task == "2afc" else sigma[:, 0] < 20
        np.save(folder / "judge.npy", judge.astype(np.float32))
    (path / "meta.json").write_text('{"what": "noise for tests"}')
    return path


@pytest.fixture(scope="session")
def judgements(tmp_path_factory):
    return make_judgements(tmp_path_factory.mktemp("judgements"))


@pytest.fixture(scope="session")
def start(tmp_path_factory, judgements, trunks):
    def start(*args, folder=None, **options):
        files = f"--dataset={judgements}", f"--trunk_weights={trunks['squeeze']}"
        return Run("lpips", folder or tmp_path_factory.mktemp("lpips"), *files, *args, **options)

    return start


@pytest.fixture(scope="session")
def finished(start):
    return {ranks: start(f"--batch_size={4 // ranks}", ranks=ranks).finish() for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", (1, 2))
def test_a_killed_run_resumes_bit_for_bit(ranks, start, finished, tmp_path):
    args = (f"--batch_size={4 // ranks}",)
    run = start(*args, ranks=ranks, trap=("step 4,", signal.SIGKILL), folder=tmp_path)
    assert run.wait()[0] == -signal.SIGKILL  # the others are killed too, or notice first that they are alone
    assert run.checkpoint[1]["step"] == 3
    resumed = start(*args, ranks=ranks, folder=tmp_path).finish()
    assert "resumed from out/latest.safetensors at step 3" in resumed.stdout
    assert_same(resumed.checkpoint[0], finished[ranks].checkpoint[0])
    assert numbers(resumed.log) == numbers(finished[ranks].log)


def test_sigterm_to_one_rank_saves_and_stops_both(start, tmp_path):
    run = start("--batch_size=2", "--max_steps=50", ranks=2, trap=("step 1,", signal.SIGTERM), folder=tmp_path)
    assert run.wait() == [128 + signal.SIGTERM] * 2, run.stderr
    step = run.checkpoint[1]["step"]
    assert 1 <= step < 5 and f"stopped at step {step} " in run.stdout and run.log[-1]["step"] == step


def test_ranks_and_accumulation_are_one_in_float64(start):
    """Without dropout, which is each rank's own."""
    args = ("--dtype=float64", "--dropout=0", "--train_trunk=True", "--lr=1e-3")
    one = start(*args, "--batch_size=4")
    two = start(*args, "--batch_size=1", "--grad_accum=2", ranks=2, keep=True)
    one.finish(), two.finish()
    assert any(name.startswith("optim.trunk.") for name in one.checkpoint[0])
    assert_same(one.checkpoint[0], two.checkpoint[0], 1e-9)
    assert_same(*(read(two.folder / f"rank{rank}.safetensors")[0] for rank in range(2)))
    for a, b in zip(one.log, two.log, strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=1e-6) for name in a.keys() - {"images_per_s"})


@pytest.mark.parametrize("ranks", (1, 2))
def test_a_judgement_that_is_not_a_number_stops_the_run(ranks, start, tmp_path):
    path = make_judgements(tmp_path / "judgements") / "2afc/train/more/judge.npy"
    np.save(path, np.where(np.arange(10) == 4, np.nan, np.load(path)))
    args = (f"--dataset={tmp_path}/judgements", f"--batch_size={4 // ranks}", "--max_steps=7", "--save_every=1")
    run = start(*args, ranks=ranks, keep=True)
    found = re.match(r".* not finite at step (\d); the weights were not updated", run.fail())
    tensors, meta = run.checkpoint
    assert meta["step"] == int(found[1]) - 1 and all(t.isfinite().all() for t in tensors.values())
    for rank in range(ranks):
        assert_same(read(run.folder / f"rank{rank}.safetensors")[0], part(tensors, "model"))


def test_what_a_run_leaves(finished, trunks, start):
    run = finished[1]
    assert [r["step"] for r in run.log] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in run.log if "val_2afc_noise" in r and "val_jnd" in r] == [3, 6]
    lr = [1e-2, 1e-2, 1e-2, 1e-2, 2e-2 / 3, 1e-2 / 3]  # half-time is step 3
    assert [r["lr"] for r in run.log] == pytest.approx(lr)
    for text in ("24 training and 14 validation judgements in ", ": noise for tests\n", "TFLOP", "jnd  category"):
        assert text in run.stdout, text
    tensors, meta = run.checkpoint
    assert meta["step"] == 6 and meta["images_seen"] == 24 and meta["config"]["max_steps"] == 6
    assert not any(name.startswith("model.trunk") for name in tensors), "a frozen trunk is named, not kept"
    ours = LPIPS("squeeze", trunks["squeeze"], run.out)
    initial = [c**-0.5 for c in TAPS["squeeze"].values()]
    assert all((w - i).abs().max() > 1e-3 and w.min() >= 0 for w, i in zip(ours.heads, initial))
    # the tables again, without training
    again = start("--eval_only=True", folder=run.folder).finish()
    tables = run.stdout[run.stdout.rindex("2afc category") : run.stdout.index("evaluation at step 6")]
    assert again.stdout.endswith(tables) and "uniform         L2       SSIM" in tables
    assert run.checkpoint[1]["step"] == 6 and len(run.log) == 6
    assert "heads of" in error(LPIPS, "alex", trunks["alex"], run.out)


def test_heads_know_their_trunk(finished, trunks, tmp_path, start):
    other = {name: t + 0.01 for name, t in torch.load(trunks["squeeze"], weights_only=True).items()}
    torch.save(other, tmp_path / "other.pth")
    message = error(LPIPS, "squeeze", tmp_path / "other.pth", finished[1].out)
    assert "its heads were trained on other weights of the trunk; set trunk_weights to those" in message
    shutil.copytree(finished[1].out, tmp_path / "out")
    message = start(f"--trunk_weights={tmp_path}/other.pth", folder=tmp_path).fail()
    assert "has other settings: trunk_hash=" in message
    # a run that starts from trained heads begins with their score
    run = start(f"--head_weights={finished[1].out}", "--eval_only=True").finish()
    assert run.stdout.split("SSIM\n")[1].split("\n")[0] in finished[1].stdout.split("SSIM\n")[-2]


def test_a_trained_trunk_comes_with_its_heads(start, trunks):
    run = start("--train_trunk=True", "--max_steps=2", "--lr=1e-3").finish()
    lpips = LPIPS("squeeze", None, run.out)  # nothing is fetched
    for name, t in torch.load(trunks["squeeze"], weights_only=True).items():
        assert not torch.equal(lpips.trunk.state_dict()[name], t)
    assert not any(p.requires_grad for p in lpips.parameters())
    # heads trained further on it would be of a network that is nowhere
    message = start(f"--head_weights={run.out}").fail()
    assert "holds a trained trunk too, which only --train_trunk=True keeps" in message
    start(f"--head_weights={run.out}", "--train_trunk=True", "--max_steps=1").finish()
    start(f"--head_weights={run.out}", "--eval_only=True").finish()


WRONG = {
    "--net=resnet": "--net=resnet must be one of vgg | alex | squeeze",
    "--dropout=1": "--dropout=1 must be in [0, 1)",
    "--dataset=nowhere": "nowhere/2afc/train: no judgements here; run data/bapps/prepare.py, or set dataset",
    "--net=alex": "patches of 20 pixels, alex needs 31",
}


@pytest.mark.parametrize("args", WRONG)
def test_a_wrong_setting_is_one_line(args, start):
    assert WRONG[args] in start(args).fail()


def test_a_damaged_set_is_named(tmp_path, start):
    path = make_judgements(tmp_path / "set")
    (path / "meta.json").unlink()
    message = start(f"--dataset={path}").fail()
    assert "set/meta.json: cannot be read" in message and message.endswith("; run data/bapps/prepare.py to its end")
    np.save(path / "2afc/train/more/judge.npy", np.zeros(3, np.float32))
    assert "more: judgements (3,) of images (10, 3, 20, 20, 3); run" in error(Judgements, str(path), "2afc", "train")


def test_every_epoch_sees_every_judgement_once(judgements):
    train = Judgements(str(judgements), "2afc", "train", seed=3)
    epochs = [[train[p]["images"].sum().item() for p in range(e * 24, e * 24 + 24)] for e in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == 24
    assert (
        list(train.parts) == ["more", "noise"]
        and train.item(10)["judge"] == np.load(judgements / "2afc/train/noise/judge.npy")[0]
    )
    images = train[0]["images"]
    assert images.shape == (3, 3, 20, 20) and images.dtype == torch.float32 and -1 <= images.min() < images.max() <= 1


# --- does it learn? ---


def test_trained_heads_beat_the_bare_network_and_l2_on_photos_and_distortions_they_never_saw(assets, tmp_path):
    photos = assets.parent / "kodak"
    if not photos.is_dir():
        pytest.skip(f"no photos at {photos}: set LDM_TEST_DATA")
    bapps.make_standin(str(photos), f"{tmp_path}/published", 32, 80, 40, 0)
    bapps.pack_judgements(f"{tmp_path}/published", f"{tmp_path}/set", 32, "a stand-in")
    args = (f"--dataset={tmp_path}/set", f"--trunk_weights={assets}/squeezenet1_1_features.pth", "--lr=1e-2")
    run = Run(
        "lpips", tmp_path, *args, "--batch_size=16", "--max_steps=100", "--eval_every=100", "--log_every=100"
    ).finish()
    names = re.search(r"2afc category +judged +(.*)", run.stdout)[1].split()
    means = dict(zip(names, map(float, re.search(r"mean +\d+ +(.*)", run.stdout)[1].split())))
    print(json.dumps(means))
    assert means["ours"] > means["uniform"] + 0.01 and means["ours"] > means["L2"] + 0.2
