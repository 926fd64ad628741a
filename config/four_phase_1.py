# KL-f8 in four phases, 1: L1 alone. Each phase starts from the EMA weights of the one before. Not yet run.
perceptual_weight = 0
disc_weight = 0
max_steps = 50_000
out_dir = "out/four_phase_1"
