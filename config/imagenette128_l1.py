# As imagenette128_gan, but L1 alone, to compare with. Kodak LPIPS .63, blurred; 5 minutes on 1 CPU core.
dataset = "data/imagenette128"  # tar shards or a folder, wherever it is: --dataset=DIR
image_size = 128
crop = "center"
workers = 0
# a 4x4 pixel-unshuffle stem, then 32x32 and 16x16
patch_size = 4
ch = 32
ch_mult = (1, 2)
num_res_blocks = 1
mid_attention = False
norm_groups = 8
perceptual_weight = 0
lpips_net = "squeeze"  # only measured, with --lpips_trunk=FILE
disc_weight = 0
batch_size = 4
grad_accum = 1
max_steps = 2400
lr = 2e-3
lr_schedule = "cosine"
lr_end = 0.1
warmup_steps = 50
beta2 = 0.99
ema_decay = 0.995
eval_every = 600
val_images = 95
save_every = 600
latent_images = 500
out_dir = "out/imagenette128_l1"
