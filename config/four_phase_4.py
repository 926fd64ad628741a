# KL-f8 in four phases, 4: 512 px, with a quarter of the images in memory at a time. Not yet run.
init_from = "out/four_phase_3"
image_size = 512
disc_start = 1
batch_size = 3
grad_accum = 8
checkpointing = True
max_steps = 50_000
out_dir = "out/four_phase_4"
