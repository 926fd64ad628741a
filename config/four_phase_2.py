# KL-f8 in four phases, 2: tanh on the output; the discriminator trains, 1,000 steps alone, then as a game. Not yet run.
init_from = "out/four_phase_1"
tanh_out = True
perceptual_weight = 0
disc_start = 1001
disc_warmup = 1000
disc_ramp = 5000
max_steps = 50_000
out_dir = "out/four_phase_2"
