"""How much of everything: the numbers behind the shipped weights, and a minute's worth of each."""

from dataclasses import dataclass

from lyco_lab.miniature.pretrain.fit import Schedule


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedules of one pretraining."""

    seed: int
    pictures: int  # of the base world
    concept_pictures: int  # of the held-out concepts: for the autoencoder and the oracle only
    validation: int
    autoencoder: Schedule
    autoencoder_batch: int
    refine: Schedule  # of the autoencoder, beside the denoiser
    polish: Schedule  # of its decoder alone
    polish_batch: int
    contrastive: Schedule
    contrastive_batch: int
    sharpen: Schedule  # of the CLIP pair
    sharpen_batch: int
    oracle: Schedule
    oracle_batch: int
    gram: Schedule
    embedder: Schedule
    eye_batch: int  # of both
    denoiser: Schedule
    denoiser_batch: int
    detail: Schedule  # of the denoiser's last phase
    color_steps: int  # of the denoiser, before its loss turns to composition
    place_from: int  # ... and then to place
    refined_from: int  # ... and has the refined latents and the sharpened captions
    judged_captions: int  # unseen captions that the finished model draws for the quality table


FULL = Recipe(
    seed=0,
    pictures=32_000,
    concept_pictures=6_000,
    validation=2_000,
    autoencoder=Schedule(steps=10_500, lr=1.5e-3, weight_decay=1e-4),
    autoencoder_batch=4,
    refine=Schedule(steps=7_000, lr=8e-4, weight_decay=1e-4),
    polish=Schedule(steps=4_500, lr=6e-4, weight_decay=1e-4),
    polish_batch=8,
    contrastive=Schedule(steps=1_000, lr=1e-3, weight_decay=0.05),
    contrastive_batch=128,
    sharpen=Schedule(steps=400, lr=5e-4, warmup=20, weight_decay=0.05),
    sharpen_batch=64,
    oracle=Schedule(steps=1_800, lr=2e-3, weight_decay=0.02),
    oracle_batch=96,
    gram=Schedule(steps=600, lr=2e-3, weight_decay=0.02),
    embedder=Schedule(steps=600, lr=2e-3, weight_decay=0.02),
    eye_batch=96,
    denoiser=Schedule(steps=15_500, lr=1.5e-3, warmup=200, decay_from=0.5, betas=(0.9, 0.99)),
    denoiser_batch=32,
    detail=Schedule(steps=1_500, lr=5e-4, warmup=50, betas=(0.9, 0.99)),
    color_steps=5_000,
    place_from=7_500,
    refined_from=9_500,
    judged_captions=500,
)
QUICK = Recipe(
    seed=0,
    pictures=256,
    concept_pictures=48,
    validation=64,
    autoencoder=Schedule(steps=40, lr=1.5e-3, weight_decay=1e-4),
    autoencoder_batch=4,
    refine=Schedule(steps=20, lr=8e-4, weight_decay=1e-4),
    polish=Schedule(steps=10, lr=6e-4, weight_decay=1e-4),
    polish_batch=4,
    contrastive=Schedule(steps=20, lr=1e-3, weight_decay=0.05),
    contrastive_batch=32,
    sharpen=Schedule(steps=10, lr=5e-4, warmup=20, weight_decay=0.05),
    sharpen_batch=16,
    oracle=Schedule(steps=30, lr=2e-3, weight_decay=0.02),
    oracle_batch=32,
    gram=Schedule(steps=10, lr=2e-3, weight_decay=0.02),
    embedder=Schedule(steps=10, lr=2e-3, weight_decay=0.02),
    eye_batch=32,
    denoiser=Schedule(steps=30, lr=1.5e-3, warmup=10, decay_from=0.5, betas=(0.9, 0.99)),
    denoiser_batch=16,
    detail=Schedule(steps=10, lr=5e-4, warmup=5, betas=(0.9, 0.99)),
    color_steps=15,
    place_from=20,
    refined_from=20,
    judged_captions=16,
)
