# LDM text-to-image, 256 px, as published: 872.3 M parameters, its text encoder trained with it. Not yet run.
# Published: 390,000 steps of 680 images, 8 GPUs x 17 x 5; with BERT's tokenizer, here with DATASET/bpe.tiktoken.
dataset = "data/laion400m"
first_stage = "out/vae"
cond = "text"
text_width = 1280
text_layers = 32
text_heads = 20
channels = 320
channel_mult = (1, 2, 4, 4)
attention_ds = (4, 2, 1)
num_heads = 8
head_dim = 0
linear_proj = False
objective = "eps"
schedule = "scaled_linear"
beta_start = 0.00085
beta_end = 0.012
timesteps = "uniform"
batch_size = 17
grad_accum = 5
max_steps = 390_000
lr = 5e-5
warmup_steps = 10_000
grad_clip = 0.0
guidance = 5.0
out_dir = "out/txt2img_ldm"
