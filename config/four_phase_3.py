# KL-f8 in four phases, 3: LPIPS joins; tanh and the discriminator come along from phase 2. Not yet run.
init_from = "out/four_phase_2"
disc_start = 1
max_steps = 100_000
out_dir = "out/four_phase_3"
