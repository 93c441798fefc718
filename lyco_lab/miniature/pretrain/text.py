"""Words: a byte-pair tokenizer learnt from captions, and a CLIP pair trained on the world.

The pair's text tower becomes Stable Diffusion's text encoder; the whole pair measures text
similarity. While training, small heads also read the attributes off both embeddings: the
contrastive loss alone is slow to tell apart captions that differ in one word.
"""

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from lyco_lab.miniature.networks import VOCABULARY
from lyco_lab.miniature.pretrain import material
from lyco_lab.miniature.pretrain.fit import fit
from lyco_lab.miniature.pretrain.labels import attribute_loss, labels
from lyco_lab.miniature.pretrain.recipe import Recipe
from lyco_lab.miniature.vocabulary import BASE, Scene, caption, varied_caption
from lyco_lab.seeds import derive, generator

LENGTH = 40  # tokens; the longest caption with a made-up name has 38
HIDDEN = 96
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(recipe: Recipe) -> CLIPTokenizer:
    """Byte-pair merges from captions. Names are spelled in letters, as `sks` is in SD's."""
    rng = random.Random(f"captions:{recipe.seed}")
    scenes = (material.base_scene(recipe.seed, material.TRAINING, i)[0] for i in range(4000))
    captions = [varied_caption(s, rng) for s in scenes]
    words = [" ".join(w for w in c.split() if not _made_up(w)) for c in captions]
    words.append("place person wearing outfit realistic figurine cape sweater red blue green")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        words * 4,
        trainers.BpeTrainer(
            vocab_size=900,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),  # fmt: skip
    )
    merges: Any = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" "))
        for m in json.loads(bpe.to_str())["model"]["merges"]
    ]
    tokens = alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in merges] + [BEGIN, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


_GRAMMAR = "a an the at in on with and wearing hair outfit style background scene toy of"
_KNOWN = {*(v for values in VOCABULARY.values() for v in values), *_GRAMMAR.split()}


def _made_up(word: str) -> bool:
    return word.strip(",") not in _KNOWN


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    clip = CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 256,
                "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": HIDDEN,
                "max_position_embeddings": LENGTH, "bos_token_id": begin,
                "eos_token_id": end, "pad_token_id": end,
            },
            vision_config={
                "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
                "num_attention_heads": 4, "image_size": 64, "patch_size": 8,
                "projection_dim": HIDDEN,
            },
            projection_dim=HIDDEN,
        )
    )  # fmt: skip
    clip.set_attn_implementation("eager")  # at this size twice as fast as the fused kernel
    return clip


class Pair(nn.Module):
    """The CLIP model and the heads that help to train it."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.image_heads = nn.ModuleDict(
            {f: nn.Linear(HIDDEN, len(v)) for f, v in VOCABULARY.items()}
        )


def train(work: Path, recipe: Recipe) -> tuple[CLIPTokenizer, CLIPModel]:
    words = tokenizer(recipe)
    base = material.training(work, recipe)
    torch.manual_seed(recipe.seed + 1)
    pair = Pair(build(words))
    clip, known = pair.clip, labels(base.scenes)
    batch = recipe.contrastive_batch

    def loss(step: int) -> Tensor:
        g = generator(recipe.seed, "contrastive", step)
        rng = random.Random(derive(recipe.seed, "captions", step))
        picked = torch.randint(len(base), (batch,), generator=g)
        x = material.to_tensor(base.pixels[picked.tolist()])
        x = x + torch.randn(x.shape, generator=g) * 0.15 * torch.rand(batch, 1, 1, 1, generator=g)
        captions = [varied_caption(base.scenes[i], rng) for i in picked.tolist()]
        with torch.autocast("cpu", torch.bfloat16):
            seen = clip.get_image_features(x).pooler_output.float()
            said = clip.get_text_features(tokens(words, captions)).pooler_output.float()
        scale = clip.logit_scale.exp().clamp(max=100)
        logits = scale * F.normalize(seen, dim=1) @ F.normalize(said, dim=1).T
        same = torch.arange(batch)
        contrast = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        guesses = {f: head(seen) for f, head in pair.image_heads.items()}
        return contrast + 0.04 * attribute_loss(guesses, known, picked)

    fit("contrastive", work, pair, loss, recipe.contrastive, save_every=100)
    return words, clip.eval()


class Sharpened(nn.Module):
    """The pair again, with heads on both sides."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.heads = nn.ModuleDict({f: nn.Linear(HIDDEN, len(v)) for f, v in VOCABULARY.items()})


def sharpen(work: Path, recipe: Recipe, words: CLIPTokenizer, first: CLIPModel) -> CLIPModel:
    """A copy of the pair that also tells apart captions which differ in one attribute.

    Among captions drawn at random hardly two agree on all but the place, so the contrastive loss
    has no use for it: after `train`, moving "left" to "right" changed the text encoder's states a
    tenth as much as moving the beach to the forest, and the denoiser could not hear it. Here each
    picture's rivals include its own caption with one value changed. Apart from that the states are
    held where they were, since the denoiser has begun to listen to them.
    """
    base = material.training(work, recipe)
    known = labels(base.scenes)
    torch.manual_seed(recipe.seed + 6)
    pair = Sharpened(copy.deepcopy(first))
    first, clip, batch = first.eval().requires_grad_(False), pair.clip, recipe.sharpen_batch

    def loss(step: int) -> Tensor:
        g = generator(recipe.seed, "sharpen", step)
        rng = random.Random(derive(recipe.seed, "sharpen-captions", step))
        picked = torch.randint(len(base), (batch,), generator=g)
        scenes = [base.scenes[i] for i in picked.tolist()]
        rivals = [altered(scene, rng) for scene in scenes]
        full = [caption(s, tags=rng.random() < 0.5) for s in (*scenes, *rivals)]
        plain = tokens(words, [varied_caption(s, rng) for s in scenes])
        x = material.to_tensor(base.pixels[picked.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            seen = clip.get_image_features(x).pooler_output.float()
            said = clip.get_text_features(tokens(words, full)).pooler_output.float()
            states = clip.text_model(plain).last_hidden_state.float()
            with torch.no_grad():
                before = first.text_model(plain).last_hidden_state.float()
        scale = clip.logit_scale.exp().clamp(max=100)
        logits = scale * F.normalize(seen, dim=1) @ F.normalize(said, dim=1).T
        same = torch.arange(batch)
        contrast = (F.cross_entropy(logits, same) + F.cross_entropy(logits[:, :batch].T, same)) / 2
        told = labels([*scenes, *rivals])
        heard = {f: head(said) for f, head in pair.heads.items()}
        read = {f: head(seen) for f, head in pair.heads.items()}
        attributes = attribute_loss(heard, told, torch.arange(2 * batch)) + attribute_loss(
            read, known, picked
        )
        return contrast + 0.1 * attributes + 0.3 * ((states - before) ** 2).mean()

    fit("sharpen", work, pair, loss, recipe.sharpen, save_every=100)
    return clip.eval()


def altered(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one attribute changed: its position in two cases of five."""
    families = [f for f in scene.attributes if f != "kind"]
    family = rng.choice(families)
    if "position" in families and rng.random() < 0.4:
        family = "position"
    value = rng.choice([v for v in BASE[family] if v != scene[family]])
    return Scene({**scene.attributes, family: value})
