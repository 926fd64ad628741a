# The recipe of sd-vae-ft-mse: decoder only, MSE + 0.1 LPIPS, EMA, 192 images a step (8 x 12 x 2), 280,000 steps.
# torchrun --nproc_per_node=8 train_vae.py config/ft_mse.py --init_from=out/kl_f8. Not yet run.
init_from = "out/kl_f8"
train = "decoder"
recon_loss = "l2"
perceptual_weight = 0.1
disc_weight = 0
max_steps = 280_000
out_dir = "out/ft_mse"
