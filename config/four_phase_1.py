# KL-f8 in four phases, 1: L1 alone. The discriminator is made here and first trains in phase 2. Not yet run.
# Each phase starts from the EMA weights of the one before, and from its discriminator.
perceptual_weight = 0
disc_start = 50_001
max_steps = 50_000
out_dir = "out/four_phase_1"
