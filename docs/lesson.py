# %% [markdown]
# # Five systems that join pictures and words
#
# This notebook takes five systems apart, in the order in which they build on each other:
#
# 1. **CLIP**: one space for pictures and captions. It classifies, and it searches.
# 2. **VQGAN**: a picture becomes a short row of tokens, and a discriminator judges what comes back.
# 3. **VQGAN+CLIP**: no training at all; CLIP's gradient moves the codes of one picture.
# 4. **DALL·E**: captions and pictures as one stream of tokens, drawn token by token.
# 5. **DALL·E 2** (unCLIP): a caption becomes a picture embedding, and that becomes a picture. And the same stream
#    the other way round: **captioning**.
#
# Parts 1 to 4 use the checkpoint `emoji` that is part of the package: twelve million parameters, trained in seven hours on one
# CPU core. It knows the names of emoji and scenes of two or three of them, nothing else. Part 5 trains a system of
# its own, all of it, in about half a minute. Everything runs on a CPU, the whole notebook in a minute or two.
#
# Run it yourself: `pip install -c constraints.txt -e '.[lesson]'`, then open `docs/lesson.ipynb`. Change things. Each part ends with
# exercises.

# %%
import json
import random
import tempfile
import warnings
from copy import deepcopy
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Image as PNG
from IPython.display import display
from PIL import Image, ImageDraw

from dalle_mini_impl import Recipe, TextToImage
from dalle_mini_impl.sheet import contact_sheet, to_pil

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars that nobody would see
torch.manual_seed(0)
model = TextToImage.from_pretrained("emoji")
vae, dalle, clip, tokenizer = model.vae, model.dalle, model.bundle.clip, model.bundle.tokenizer
for name, part in {"VAE": vae, "CLIP": clip, "DALL·E": dalle}.items():
    print(f"{name:7} {sum(p.numel() for p in part.parameters()):>10,} parameters")


def show_small(image):
    """Shows a picture as a PNG of so few colours that it takes at most 30 kB, since the notebook keeps it."""
    for num_colours in (256, 128, 64, 32):
        file = BytesIO()
        image.convert("RGB").quantize(num_colours, kmeans=1, dither=0).save(file, "PNG", optimize=True)
        if file.tell() <= 30_000:
            break
    display(PNG(data=file.getvalue()))


def show(*rows, cell_px=80, columns=8):
    """Shows rows of pictures: each a title and pairs of a picture and its label."""
    show_small(contact_sheet(rows, cell_px=cell_px, columns=columns))


def show_figure(figure):
    """Shows a chart, and closes it."""
    file = BytesIO()
    figure.savefig(file, dpi=80, bbox_inches="tight")
    plt.close(figure)
    show_small(Image.open(file))


# %% [markdown]
# We also need pictures that no model of ours has drawn: 16 emoji, and 8 scenes. The emoji were part of the training (a
# model can't know a glyph that it has never seen), the scenes were **held out**: training never showed these two things
# together. We keep that in mind whenever something works surprisingly well.

# %%
SIDE = 80
NAMES = (
    "dog face,cat face,frog,penguin,red heart,red apple,banana,pizza,"
    "rocket,automobile,bicycle,sun with face,cactus,guitar,soccer ball,key"
).split(",")
SCENES = [
    "a lemon to the right of T-Rex",
    "a drum to the left of a dragon on a gray background",
    "a soccer ball to the left of a taco",
    "an elephant to the left of books",
    "a turtle under a face with tears of joy on a blue background",
    "a chicken under a fire engine on a light green background",
    "a locomotive above a candle",
    "a pizza left of an egg",
]
CAPTIONS = [*NAMES, *SCENES]
sheet = Image.open("lesson-pictures.png").convert("RGB")
corners = [(x, y) for y in range(0, sheet.height, SIDE) for x in range(0, sheet.width, SIDE)]
pictures = [sheet.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2) / 255
print("pixels:", tuple(pixels.shape), "from", pixels.min().item(), "to", pixels.max().item())
show(
    ("16 emoji", [(picture, "") for picture in pictures[:16]]), ("8 held-out scenes", [(p, "") for p in pictures[16:]])
)

# %% [markdown]
# ## Part 1 · CLIP
#
# [CLIP](https://arxiv.org/abs/2103.00020) ([`clip.py`](../dalle_mini_impl/clip.py)) has two towers. One turns a picture into a
# vector, the other a caption; both vectors have length 1. It was trained on one wish: a picture and *its* caption shall point in
# the same direction, a picture and another caption shall not.
#
# ### How it scores
#
# The score of a pair is the **cosine** of the angle between its vectors: a dot product, since both are unit vectors. Below is the
# table of all scores of the eight held-out scenes. The diagonal holds the true pairs, so it should be the brightest in
# its row and in its column.

# %%
with torch.no_grad():
    text_ids, _ = tokenizer.batch(SCENES, clip.text_length)  # (8, T)
    text_vectors = clip.encode_text(text_ids)  # (8, E)
    image_vectors = clip.encode_image(pixels[16:])  # (8, E)
cosines = image_vectors @ text_vectors.t()  # (8, 8)

figure, axis = plt.subplots(figsize=(7, 4))
axis.imshow(cosines, cmap="viridis")
axis.set(yticks=range(8), xticks=range(8), xlabel="caption", ylabel="picture")
axis.set_yticklabels([f"{number}  {caption[:34]}" for number, caption in enumerate(SCENES)])
for row in range(8):
    for column in range(8):
        ink = "black" if cosines[row, column] > 0.4 else "white"
        axis.text(column, row, f"{cosines[row, column]:.2f}", ha="center", va="center", color=ink, fontsize=8)
show_figure(figure)
captions_found = (cosines.argmax(dim=1) == torch.arange(8)).sum().item()
print(
    f"{captions_found} of 8 pictures find their own caption; the length of each vector is {image_vectors.norm(dim=1).mean():.3f}"
)

# %% [markdown]
# ### What it was trained on
#
# Each row of that table, times a learned **logit scale**, goes through a softmax: "which of these captions is mine?" So
# does each column. The loss is the mean cross-entropy of both (InfoNCE). One that guesses pays ln 8 = 2.08 nats among eight
# pairs; this one should pay nearly nothing. The pictures are easy to tell apart, and that is the point of large
# batches: the more negatives, the more has to be known.

# %%
logits = clip.scale * cosines
own = torch.arange(8)
info_nce = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
print(f"logit scale {clip.scale:.1f};  loss {info_nce:.4f} nats, guessing {np.log(8):.4f}")

# %% [markdown]
# ### Zero-shot classification
#
# A classifier for free ([`classify.py`](../dalle_mini_impl/classify.py)): write each class as a caption, and see which one the picture is
# nearest to. Nobody trained a classifier. **Templates** put the label into a sentence, and the mean of their vectors is
# the label's direction. You should see nearly all probability on the right label, and some doubt between things that look alike.

# %%
from dalle_mini_impl.classify import ZeroShotClassifier

classifier = ZeroShotClassifier(model.embedder, NAMES, templates=["{}", "a picture of a {}", "{} emoji"])
probabilities = classifier.probabilities(pictures[:16])  # (16, 16)
accuracy = (probabilities.argmax(dim=1) == torch.arange(16)).float().mean().item()
for index in (0, 5, 9):
    best = probabilities[index].topk(3)
    print(f"{NAMES[index]:12}", ", ".join(f"{NAMES[i]} {p:.1%}" for p, i in zip(best.values, best.indices)))
print(f"accuracy over the 16 emoji: {accuracy:.0%} (chance 6 %)")

# %% [markdown]
# That was easy: these glyphs were in the training. Two harder questions. First the held-out scenes, with their own
# caption against the same one *turned round*: does it know left from right? Expect about 50 % for each: a coin toss. It
# knows *what* is there, not *where*. Turned captions were rare among the negatives of a batch, so the loss never asked.
# (Large CLIPs have the same weakness. A cure comes below.) Then classes that are no names of
# emoji. A model of three million parameters that has only ever read such names doesn't know what food is, and fails.

# %%
TURNED = {"right of": "left of", "left of": "right of", "under": "above", "above": "under"}


def turned(caption):
    """The caption with its relation the other way round."""
    relation = next(word for word in TURNED if word in caption)
    return caption.replace(relation, TURNED[relation])


told_apart = 0
for caption, picture in zip(SCENES, pictures[16:]):
    right = ZeroShotClassifier(model.embedder, [caption, turned(caption)]).probabilities([picture])[0, 0].item()
    told_apart += right > 0.5
    print(f"{right:6.1%}  {caption}")
print(f"left and right, above and under: {told_apart} of 8 right (chance 4)\n")

kinds = ZeroShotClassifier(model.embedder, ["an animal", "food", "a vehicle"])
for index in (0, 2, 5, 7, 8, 9):
    print(
        f"{NAMES[index]:12}",
        ", ".join(f"{k} {p:.0%}" for k, p in zip(kinds.labels, kinds.probabilities([pictures[index]])[0])),
    )

# %% [markdown]
# ### Search
#
# Turned round, the classifier is a search engine: embed all pictures once, then a query is one vector, and one matrix product
# ranks everything. (`dalle-mini index` and `search` do it for folders: [`search.py`](../dalle_mini_impl/search.py).) The first three queries should
# find their picture at once; what follows shares a colour or a form. The last one fails, and teaches something: there
# *is* a taco, beside a ball. But a picture has a single vector, for all that it shows, and half of that is ball.

# %%
index_vectors = model.embedder.encode_pictures(pictures)  # (24, E), once
rows, first_found = [], {}
for query in ("a red heart", "a frog", "a turtle below a face with tears of joy", "a taco"):
    scores = index_vectors @ model.embedder.encode_texts([query])[0]  # (24,)
    best = scores.topk(6)
    first_found[query] = CAPTIONS[best.indices[0]]
    rows.append((query, [(pictures[i], f"{score:.2f}") for score, i in zip(best.values, best.indices)]))
show(*rows, cell_px=64)

# %% [markdown]
# ### Reading word by word
#
# So the cosine asks too little of a picture. This CLIP has a **captioner** ([`captioner.py`](../dalle_mini_impl/captioner.py), the idea of
# [CoCa](https://arxiv.org/abs/2205.01917)): a small causal transformer that sees the image tower's vectors of all places, before they are
# averaged into one, and predicts a caption word by word. Its loss asks for *every* word, "left" as much as "frog".
#
# It writes captions of pictures that it has never seen; and log p(caption | picture) compares two captions. Expect each scene told from its turned caption, by a
# margin of ten nats or so: what was a coin toss for the cosine was in the features all the time.

# %%
read_apart = 0
for caption, picture in zip(SCENES, pictures[16:]):
    own, other = (score.read_score for score in model.score([picture] * 2, [caption, turned(caption)]))
    read_apart += own > other
    print(f"{own - other:+6.1f} nats  {caption:62} reads: {model.caption(picture)[0].caption}")
print(f"told from their turned captions: {read_apart} of 8; the cosine had {told_apart}")

# %% [markdown]
# **Exercises.** 1. Search by picture: take a row of `index_vectors` as the query. Which pictures are nearest to the dog? 2. Add the label
# "a robot" to the classifier. Does it ever win? What does a softmax do where *no* label fits? 3. Multiply the logits by 0.1 before
# the softmax. Which numbers change, and which never do?

# %% [markdown]
# ## Part 2 · VQGAN
#
# A transformer wants a short row of symbols from a fixed vocabulary. Pixels are no such thing; a **discrete VAE**
# ([`vae/`](../dalle_mini_impl/vae/model.py)) makes one of them. Its encoder shrinks 80×80 pixels to a grid of 10×10 vectors,
# the quantizer replaces each by the nearest of 1,024 **codes**, and the decoder paints the picture back from these alone.
#
# ### Tokens
#
# So a picture is 100 ids of 10 bits each. Compare with its pixels: most of the picture has to be thrown away, and what
# comes back should still be nearly the same. Plain background has few different codes, edges have many.

# %%
ids = vae.encode(pixels)  # (24, 100)
rebuilt = vae.decode(ids).detach()  # (24, 3, 80, 80) in [0, 1]
print("the ids of the frog:")
print(ids[2].view(10, 10).numpy())
print(
    f"\n{SIDE * SIDE * 24:,} bits of pixels become {ids.shape[1] * 10:,} bits of tokens: 1/{SIDE * SIDE * 24 // (ids.shape[1] * 10)}"
)


def with_grid(picture):
    """The picture, enlarged, with the borders of its cells."""
    large = picture.resize((240, 240), Image.Resampling.NEAREST)
    for line in range(0, 240, 24):
        large.paste((200, 200, 200), (line, 0, line + 1, 240))
        large.paste((200, 200, 200), (0, line, 240, line + 1))
    return large


show(
    (
        "a cell of 8 x 8 pixels a token",
        [(with_grid(pictures[2]), "picture"), (with_grid(to_pil(rebuilt)[2]), "rebuilt")],
    ),
    cell_px=240,
)

# %% [markdown]
# ### What a token covers
#
# Is a token a tile of a mosaic? Replace one, decode again, and look at what has changed. You should see a patch that
# is larger than its own cell: the decoder's convolutions look around, so that neighbours fit together. What a token
# paints depends on those beside it. The last picture is the mean over 36 such changes, moved to the middle: brightest in
# the token's own 8×8 pixels, and a glow around it.

# %%
generator = torch.Generator().manual_seed(0)
influence = torch.zeros(SIDE, SIDE)
inside = []
for row in range(2, 8):
    for column in range(2, 8):
        changed = ids[2].clone()
        changed[row * 10 + column] = torch.randint(vae.num_codes, (1,), generator=generator).item()
        after = model.decode(changed[None])[0]
        difference = (after - rebuilt[2]).abs().mean(dim=0)  # (80, 80)
        own_cell = difference[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        inside.append((own_cell.sum() / difference.sum()).item())
        influence += difference.roll((36 - 8 * row, 36 - 8 * column), (0, 1)) / 36
        if (row, column) == (4, 4):
            example = after, difference

heats = [(heat / heat.max()).expand(3, -1, -1) for heat in (example[1], influence)]
labels = ["before", "one code replaced", "what changed", "mean of 36, centred"]
show(("", list(zip(to_pil(torch.stack([rebuilt[2], example[0], *heats])), labels))), cell_px=160)
share_inside = float(np.mean(inside))
print(f"{share_inside:.0%} of the change lies inside of the token's own cell, which is 1 % of the picture")

# %% [markdown]
# ### The codebook
#
# What do the codes look like? Here are the 24 that our pictures use most, whites left out, each alone in all
# 100 cells. You should see plain colours, and stripes that were edges: a code says how a patch looks, not which thing it is part of. (Alone in all
# cells it is far from anything that the decoder was trained on, so read these with care.)
#
# A code that is never used is wasted. The usual measure is the **perplexity**: e to the entropy of how often each is
# used, so 1,024 where all are used equally. Over the data that it was trained with it is 526; 24 pictures can't show as much.

# %%
counts = torch.bincount(ids.flatten(), minlength=vae.num_codes)
shares = counts[counts > 0] / counts.sum()
perplexity = (-(shares * shares.log()).sum()).exp().item()
painted = vae.decode(counts.argsort(descending=True)[:100, None].expand(-1, 100)).detach()  # (100, 3, 80, 80)
coloured = (painted.mean(dim=(1, 2, 3)) < 0.93).nonzero()[:24, 0]
names = [f"{i}: {counts[i]}" for i in counts.argsort(descending=True)[coloured].tolist()]
show(
    ("id and uses of the codes used most, each painted in all cells", list(zip(to_pil(painted[coloured]), names))),
    cell_px=56,
    columns=12,
)
print(f"{(counts > 0).sum()} of {vae.num_codes} codes in use, perplexity {perplexity:.0f}")

# %% [markdown]
# ### What is lost
#
# What the VAE loses, nothing later can draw. Held-out scenes should come back well, with soft eyes and wheels: half a
# side is 5 cells, and a face has to fit in there. The last two are not of its world, noise and letters. It paints them with
# the strokes it has. **PSNR** is the error in decibels: 30 and more is hard to tell from the original, 20 is plainly worse.

# %%
from dalle_mini_impl.vae.losses import psnr

letters = Image.new("RGB", (SIDE, SIDE), "white")
for line in range(5):
    ImageDraw.Draw(letters).text((4, 4 + 15 * line), "To be or not", fill="black")
strange = torch.stack([torch.rand(3, SIDE, SIDE), torch.from_numpy(np.array(letters)).permute(2, 0, 1) / 255])
originals = torch.cat([pixels[[0, 9]], pixels[16:20], strange])
returned = model.decode(vae.encode(originals))
decibels = psnr(originals, returned)
show(
    ("originals", [(picture, "") for picture in to_pil(originals)]),
    ("rebuilt from 100 tokens", [(picture, f"{db:.1f} dB") for picture, db in zip(to_pil(returned), decibels)]),
)

# %% [markdown]
# ### The GAN of VQGAN
#
# Losses that count errors pixel by pixel paint the *average* of all that a token can mean: soft edges. [VQGAN](https://arxiv.org/abs/2012.09841)
# adds a **patch discriminator** ([`vae/discriminator.py`](../dalle_mini_impl/vae/discriminator.py)): it sees a few pixels at a time, here 16×16,
# and learns to tell true patches from rebuilt ones. Then the decoder pays for being found out. Here in miniature, on our
# 24 pictures:
#
# - first the discriminator learns **alone**: its logits for real and rebuilt patches should part;
# - then **both** learn in turn (the hinge loss, and λ, which keeps the adversarial pull at the decoder's last layer at a
#   share of the others'): the gap should close again. Encoder and codebook are frozen, so that the ids stay the same and DALL·E, which only knows ids, needs
#   no new training.
#
# The decoder would also change without an adversary, since it goes on learning on 24 pictures. So there is a control with
# weight 0: only the difference of the two says what the discriminator did.

# %%
from dalle_mini_impl.vae.discriminator import PatchDiscriminator, discriminator_loss, generator_loss

ALONE, STEPS, BATCH = 80, 110, 8


def train_against(weight):
    """The decoder after adversarial training, and the discriminator's mean logits (steps, 2) of real and rebuilt."""
    torch.manual_seed(0)
    painter, discriminator = deepcopy(vae), PatchDiscriminator(width=16, num_layers=1)
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3, betas=(0.9, 0.99))
    g_optimizer = torch.optim.AdamW(painter.decoder.parameters(), lr=3e-4, betas=(0.5, 0.9))
    history = []
    for step in range(STEPS):
        chosen = torch.randperm(len(pixels))[:BATCH]
        images, fake = pixels[chosen], rebuilt[chosen]
        if step >= ALONE:  # the decoder's turn
            raw = painter.redecode(images).raw  # to hard ids and back, with a gradient to the decoder alone
            fake = painter.pictures(raw)
            closeness = torch.stack(list(painter.reconstruction_terms(images, raw).values())).sum()
            adversarial = generator_loss(discriminator(fake - 0.5), "hinge")
            pulls = [torch.autograd.grad(x, painter.last_layer, retain_graph=True)[0] for x in (closeness, adversarial)]
            adaptive = weight * pulls[0].norm() / pulls[1].norm()  # λ
            g_optimizer.zero_grad()
            (closeness + adaptive * adversarial).backward()
            g_optimizer.step()
        real_logits, fake_logits = discriminator(images - 0.5), discriminator(fake.detach() - 0.5)
        d_optimizer.zero_grad()
        discriminator_loss(real_logits, fake_logits, "hinge").backward()
        d_optimizer.step()
        history.append((real_logits.mean().item(), fake_logits.mean().item()))
    return painter, np.array(history)


(control, _), (painter, history) = train_against(0.0), train_against(0.3)
figure, axis = plt.subplots(figsize=(6, 2.4))
axis.plot(history[:, 0] - history[:, 1])
axis.axhline(0, color="lightgray")
axis.axvline(ALONE, color="gray", linestyle=":")
axis.set(xlabel="step (dotted: the decoder joins in)", ylabel="real - rebuilt")
show_figure(figure)
gap_alone = float((history[:, 0] - history[:, 1])[ALONE - 10 : ALONE].mean())
print(f"gap between real and rebuilt when the decoder joins in: {gap_alone:.2f}")

# %% [markdown]
# What has it done to the pictures? **Sharpness** is the mean difference of neighbouring pixels, as a share of the
# originals'. It should be higher with the adversary than in the control, and PSNR a little lower: crisp and slightly wrong costs more,
# pixel by pixel, than soft. The ids must be the very same. With 24 pictures and thirty steps this is a mechanism at work, not a better
# VAE; what a real run of it gives, and where it doesn't help, is measured in [vqgan.md](vqgan.md).


# %%
def sharpness(images):
    """Mean difference of neighbouring pixels."""
    return (images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()).item()


versions = {"originals": pixels, "before": rebuilt}
versions |= {title: part.decode(ids).detach() for title, part in {"control": control, "adversarial": painter}.items()}
sharp = {title: sharpness(images) / sharpness(pixels) for title, images in versions.items()}
decibels = {title: psnr(pixels, images).mean().item() for title, images in versions.items()}
for title in ("before", "control", "adversarial"):
    print(f"{title:12} sharpness {sharp[title]:6.1%}   PSNR {decibels[title]:.2f} dB")
same_ids = torch.equal(painter.encode(pixels), ids)
print("ids unchanged:", same_ids)
show(
    *((title, [(picture, "") for picture in to_pil(images[[0, 3, 10]])]) for title, images in versions.items()),
    cell_px=88,
    columns=3,
)

# %% [markdown]
# **Exercises.** 1. `train_against(3.0)`: what do sharpness and PSNR do, and what do you see? 2. Swap the two arguments of
# `discriminator_loss`. What would the curves look like, and what would the decoder learn? Try it. 3. Replace ten random tokens of the pizza. How many
# can you replace before CLIP (part 1) doubts that it is one?

# %% [markdown]
# ## Part 3 · VQGAN+CLIP
#
# A decoder that paints codes, and a judge that scores pictures, both with gradients: then a picture can be
# *optimised*. [VQGAN+CLIP](https://arxiv.org/abs/2204.08583) ([`guided.py`](../dalle_mini_impl/guided.py)) trains nothing. It takes the latents behind one
# grid of codes, decodes them, cuts a few slightly different pieces out of the picture, asks CLIP for their distance to the prompt,
# and lets Adam move the latents. Rounding to codes has no gradient, so the gradient passes it **straight through**.
#
# ### From noise
#
# Random codes, and "a red heart". CLIP's score must rise, and it does: to what true pictures have. Look at the picture before you trust the
# score! A small CLIP that has only ever seen whole, tidy pictures is content with red and curves in about the right
# places. (The cut-outs are there against exactly that, and large CLIPs, trained on everything, are harder to fool.)

# %%
from dalle_mini_impl.guided import GuideSettings

quick = GuideSettings(steps=40, cutouts=6)
from_noise = list(model.guide("a red heart", "noise", settings=quick))


def strip(title, steps, shown=(0, 3, 6, 10, 15, 20, 30, 40)):
    """A row of pictures on the way, with CLIP's scores."""
    return title, [(to_pil(steps[i].picture[None])[0], f"{i}: {steps[i].score:.2f}") for i in shown]


show(strip("a red heart, from random codes (step: score)", from_noise), cell_px=72)

# %% [markdown]
# ### From a picture
#
# Start from something that is a picture already, and the same method becomes an editor. Here the loss also has an opinion of DALL·E's in it
# (`prior`: how likely are these codes?), which keeps the picture a picture. You should see the heart change its colour and keep
# its form; and the dog become something of a panda.

# %%
to_blue = list(model.guide("a blue heart", pictures[4], settings=quick))
to_panda = list(model.guide("a panda", pictures[0], settings=quick))
show(strip("red heart -> a blue heart", to_blue), strip("dog face -> a panda", to_panda), cell_px=64)

figure, axis = plt.subplots(figsize=(6, 2.4))
for label, steps in {
    "noise -> a red heart": from_noise,
    "heart -> a blue heart": to_blue,
    "dog -> a panda": to_panda,
}.items():
    axis.plot([step.score for step in steps], label=label)
axis.set(xlabel="step", ylabel="CLIP's score")
axis.legend()
show_figure(figure)
print(
    "before -> after:",
    ", ".join(f"{steps[0].score:.2f} -> {steps[-1].score:.2f}" for steps in (from_noise, to_blue, to_panda)),
)

# %% [markdown]
# **Exercises.** 1. `GuideSettings(prior=0)`: what becomes of the background, and of the score? Which of the two would you
# rather believe? 2. `nearness=0.3` keeps to the start. Give two prompts, `["a blue heart", "a star:-0.5"]`. 3. Is 0.9 a good score? Compute the score of
# the true pictures in part 1 with their captions, and explain why a score says little across prompts. More: [guided.md](guided.md).

# %% [markdown]
# ## Part 4 · DALL·E
#
# [DALL·E](https://arxiv.org/abs/2102.12092) ([`dalle.py`](../dalle_mini_impl/dalle.py)) is a language model whose sentences begin with words and
# end with the 100 tokens of a picture. It never sees a pixel.
#
# ### One stream
#
# The caption becomes pieces of words ([`text.py`](../dalle_mini_impl/text.py), SentencePiece), framed by begin and end, filled up with
# padding; the picture becomes its ids. [`stream.py`](../dalle_mini_impl/stream.py) joins them. Each token is predicted from all before it, so
#
# p(caption, picture) = Π p(token | all tokens before it)
#
# and p(picture | caption) is the second half of that product.

# %%
from dalle_mini_impl.stream import BOS, EOS, PAD

caption, picture_ids = SCENES[1], ids[17]
text_ids, _ = tokenizer.batch([caption], dalle.stream.text_length)
((_, text),) = dalle.stream.groups(text_ids)  # cut to the slots that this caption takes
special = {BOS: "<begin>", EOS: "<end>", PAD: "<pad>"}
words = [special.get(i) or tokenizer.decode([i]) for i in text[0].tolist()]
print("text :", " | ".join(words))
print("ids  :", text[0].tolist())
print("image:", picture_ids[:12].tolist(), "... 100 in all")
with torch.no_grad():
    text_logits, image_logits = dalle(text, picture_ids[None])
print(
    f"\n{text.shape[1]} + 100 tokens go in; logits of the next: text {tuple(text_logits.shape)}, image {tuple(image_logits.shape)}"
)

# %% [markdown]
# ### What comes next?
#
# Feed it a caption and the picture so far, and it says how likely each of the 1,024 codes is in the next cell. First what it
# would pay for each token of the true picture, in bits. You should see cheap background, and expensive cells where a thing
# *begins*: once its first tokens are there, the rest of it follows. Without the caption the beginnings cost more, in all by
# some dozens of bits, which is what it takes to say which two of a thousand things stand where, on which background.
#
# Then the cell that surprised it most: its five likeliest codes there.

# %%
with torch.no_grad():
    bits = -dalle.token_log_likelihoods(text_ids, picture_ids[None])[0] / np.log(2)  # (100,)
    bits_null = -dalle.token_log_likelihoods(dalle.stream.null_captions(text_ids), picture_ids[None])[0] / np.log(2)
    cell = bits.argmax().item()
    next_code = dalle(text, picture_ids[None, :cell])[1][0, -1].softmax(dim=0)  # (1024,)

figure, axes = plt.subplots(1, 3, figsize=(8, 2.6), layout="constrained")
axes[0].imshow(pictures[17])
for axis, values, title in ((axes[1], bits, "with its caption"), (axes[2], bits_null, "without")):
    shown = axis.imshow(values.view(10, 10), vmin=0, vmax=10)
    axis.set_title(f"{title}: {values.sum():.0f} bits", fontsize=10)
for axis in axes:
    axis.axis("off")
figure.colorbar(shown, ax=axes, label="bits")
show_figure(figure)
caption_saves = (bits_null.sum() - bits.sum()).item()
print(f"knowing nothing at all: 1,000 bits; the caption saves {caption_saves:.0f}")
top = next_code.topk(5)
print(
    f"row {cell // 10}, column {cell % 10}:",
    ", ".join(f"code {i} {p:.1%}" for p, i in zip(top.values.tolist(), top.indices.tolist())),
    f"(true: {picture_ids[cell]})",
)

# %% [markdown]
# ### Drawing, token by token
#
# To draw, ask for the next code, draw one by its probability, append it, repeat. That is all of the sampler below. (The one in
# [`sampling.py`](../dalle_mini_impl/sampling.py) draws the same way from a KV cache, many pictures at a time, and filters unlikely tokens.)
# `TextToImage.stream` shows how a picture grows, row by row.
# The plain loop should give something that is half right: without filters (`top_p`) one unlikely token in a hundred is drawn, and everything after it has
# to live with that.


# %%
@torch.no_grad()
def draw(caption, seed):
    """Draws the ids (1, 100) of a picture in the slow, obvious way."""
    generator = torch.Generator().manual_seed(seed)
    ((_, text),) = dalle.stream.groups(tokenizer.batch([caption], dalle.stream.text_length)[0])
    drawn = torch.empty(1, 0, dtype=torch.long)
    for _ in range(dalle.stream.num_image_tokens):
        next_code = dalle(text, drawn)[1][:, -1].softmax(dim=1)
        drawn = torch.cat([drawn, torch.multinomial(next_code, 1, generator=generator)], dim=1)
    return drawn


prompt = "a frog to the left of a rocket"
slow = [to_pil(model.decode(draw(prompt, seed)))[0] for seed in (0, 1)]
growing = [drawing.images[0] for drawing in model.stream(prompt, candidates=1, seed=3)]
show(
    (f"{prompt}: by the loop above", [(picture, "") for picture in slow]),
    ("TextToImage.stream", [(p, "") for p in growing[-9:]]),
    columns=9,
)

# %% [markdown]
# ### Guidance
#
# In training one caption in ten was replaced by the **null caption**. So the model also knows p(token | nothing), and we can exaggerate
# what the caption changes ([classifier-free guidance](https://arxiv.org/abs/2207.12598), [`filters.py`](../dalle_mini_impl/filters.py)):
#
# logits = null + scale × (conditional - null)
#
# Scale 0 ignores the prompt, 1 is the plain model. A little above 1 a few more may be right, at the price of
# variety. Far above that they break: the
# logits leave the range in which they mean anything. (So this checkpoint lets the scale *rise* along the grid, from 1 to 3: what
# to draw is decided mildly, how to finish it firmly.) The noise is the same in each column.

# %%
prompt = "a frog above a banana"
rows, guided_scores = [], {}
for scale in (0, 1, 3, 6):
    settings = model.settings(guidance=scale, guidance_schedule="constant")
    drawn = sorted(model.draw([prompt], 8, 8, settings=settings)[0], key=lambda picture: picture.candidate)
    guided_scores[scale] = float(np.mean([picture.clip_score for picture in drawn]))
    rows.append(
        (f"scale {scale}: mean CLIP score {guided_scores[scale]:.2f}", [(picture.image, "") for picture in drawn])
    )
show(*rows, cell_px=48)

# %% [markdown]
# ### The best of N
#
# Sampling is luck, so draw many and let CLIP choose ([`rerank.py`](../dalle_mini_impl/rerank.py)); DALL·E's paper drew 512. The score adds up
# log-likelihoods: the cosine times its scale, what the captioner reads, and, with a small weight, DALL·E's own. The best should show the
# right two things on the right sides, and the worst others, or the sides turned.

# %%
ranked = model("a penguin to the right of a guitar", candidates=32, keep=32, seed=0, guidance=1.0)
show(
    ("a penguin to the right of a guitar: the best of 32", [(p.image, f"{p.score:.1f}") for p in ranked[:8]]),
    ("and the worst", [(p.image, f"{p.score:.1f}") for p in ranked[-8:]]),
    cell_px=64,
)
print(
    f"log p(prompt | picture): best {ranked[0].read_score:.1f}, median {ranked[16].read_score:.1f}, worst {ranked[-1].read_score:.1f} nats"
)

# %% [markdown]
# ### The likelihood reads, too
#
# DALL·E gives p(picture | caption). By Bayes' rule p(caption | picture) is proportional to it, if all captions are equally likely before. So the
# generator is a classifier as well, with `TextToImage.score`, though nobody trained one. For each held-out scene its own
# caption and the turned one: the difference of the log-likelihoods, in nats. Above 0 means that the true one wins. Where the cosine
# tossed a coin, the generator should be sure of some and undecided (near 0) about others: to draw a scene it had to learn where things go.
# (The captioner of part 1 is better at it: reading is easier than drawing.)

# %%
flipped = [turned(caption) for caption in SCENES]
true_scores, turned_scores = model.score(pictures[16:], SCENES), model.score(pictures[16:], flipped)
margins = [own.log_likelihood - other.log_likelihood for own, other in zip(true_scores, turned_scores)]
for caption, margin in zip(SCENES, margins):
    print(f"{margin:+7.1f} nats  {caption}")
read_right = sum(margin > 0 for margin in margins)
print(f"{read_right} of 8 right; the cosine had {told_apart}, the captioner {read_apart}")

# %% [markdown]
# **Exercises.** 1. Give `draw` a temperature: divide the logits by 0.5, by 2. 2. `model.complete(pictures[0], "a cat face", share=0.5)` keeps the upper half of
# the dog. Why can it not keep the lower half as naturally? 3. Plot the CLIP score of the best of N against N, from `ranked`. Where
# does it stop to pay? (`dalle-mini rerank --curve` judges with something that is not CLIP.)

# %% [markdown]
# ## Part 5 · DALL·E 2
#
# [DALL·E 2](https://arxiv.org/abs/2204.06125) puts CLIP's embedding in between: a **prior** turns the caption into the embedding of a *picture*, and
# a **decoder** draws what has this embedding. Here both are transformers over tokens ([`prior.py`](../dalle_mini_impl/prior.py),
# [unclip.md](unclip.md)): the prior predicts the embedding's principal components, cut into buckets, one code after the other, and the decoder is our
# DALL·E with the embedding as four tokens ahead of the caption.
#
# The checkpoint `emoji` has no prior. So we train a whole system before your eyes, in a world small enough for half a
# minute on a CPU: one large shape of 8 forms and 8 colours, 32×32 pixels, 4×4 tokens. **Eight pairs of form and colour are never
# shown** (`HELD_OUT_PAIRS`, the blue square among them), to see what it makes of them.

# %%
from dalle_mini_impl.data.scenes import HELD_OUT_PAIRS, SEEN_PAIRS, Scene, Thing, render

rng = random.Random(0)


def named(colour, shape):
    """The caption of a shape."""
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


def one_shape(colour, shape):
    """A large shape somewhere on white."""
    radius = rng.uniform(0.30, 0.38)
    x, y = (rng.uniform(0.06 + radius, 0.94 - radius) for _ in range(2))
    return render(Scene((Thing(colour, shape, x, y, radius),), "white"), 32)


folder = tempfile.TemporaryDirectory()
world = Path(folder.name) / "world"
world.mkdir()
for index in range(1200):
    colour, shape = rng.choice(SEEN_PAIRS)
    one_shape(colour, shape).save(world / f"{index:04d}.png")
    (world / f"{index:04d}.txt").write_text(named(colour, shape))
print(len(SEEN_PAIRS), "pairs are shown, these never:", ", ".join(" ".join(pair) for pair in sorted(HELD_OUT_PAIRS)))
show(
    (
        "some of the 1,200 training pictures",
        [(Image.open(world / f"{i:04d}.png"), (world / f"{i:04d}.txt").read_text()) for i in range(7)],
    ),
    cell_px=104,
)

# %% [markdown]
# Four stages, each on top of those before: the VAE (pictures to tokens), CLIP (pictures and captions to embeddings), the prior, the decoder.
# Half of the captions are dropped while the decoder trains, and a tenth of the embeddings, so that it learns to do with either. A fifth of
# the pictures come *ahead* of their caption (`reading_share`): then the caption is what has to be predicted.

# %%
from dalle_mini_impl.training.run import train


def stage(steps, batch_size, **options):
    """A stage of so many steps that is evaluated once, at its end."""
    fixed = {"evaluations": 1, "warmup_steps": 10, "ema_decay": 0.95, "compile": False}
    return {"steps": steps, "batch_size": batch_size, **fixed, **options}


recipe = Recipe.model_validate(
    {
        "name": "lesson",
        "data": {"image_size": 32},
        "text": {"vocab_size": 400, "max_length": 8, "bpe_dropout": 0.0},
        "vae": {
            "downsample": 8,
            "width": 32,
            "latent_width": 64,
            "encoder_blocks": 1,
            "decoder_blocks": 2,
            "codebook_size": 256,
            "dead_code_share": 0.2,
            "quantize_after": 0.1,
        },
        "clip": {"embed_dim": 48, "stem_width": 24, "width": 64, "heads": 2, "image_layers": 1, "text_layers": 1},
        "prior": {"dim": 64, "layers": 2, "heads": 2, "num_dims": 24, "num_buckets": 32, "num_dot_buckets": 4},
        "dalle": {
            "dim": 96,
            "layers": 4,
            "heads": 3,
            "image_prefix": 4,
            "caption_dropout": 0.5,
            "embedding_dropout": 0.1,
            "reading_share": 0.2,
        },
        "train": {
            "vae": stage(220, 32),
            "clip": stage(120, 64, muon_learning_rate=0.01),
            "prior": stage(120, 64),
            "dalle": stage(180, 64, muon_smallest=1.5e-3),
        },
    }
)
run = Path(folder.name) / "run"
train(recipe, str(world), run)

metrics = json.loads((run / "checkpoint" / "config.json").read_text())["metrics"]
print(
    f"VAE   PSNR {metrics['vae']['psnr']:.1f} dB, perplexity of the codes {metrics['vae']['perplexity']:.0f} of {metrics['vae']['num_codes']}"
)
print(
    f"CLIP  finds the picture of a caption among {metrics['clip']['num_pairs']:.0f}: {metrics['clip']['text_to_image_recall_at_1']:.0%}"
)
print(
    f"prior cosine of what it draws with the true embedding {metrics['prior']['cosine_drawn']:.2f} (another picture's {metrics['prior']['cosine_other']:.2f})"
)
print(f"DALLE {metrics['dalle']['image_bits']:.2f} bits a token (uniform 8.00)")

# %% [markdown]
# ### From a caption: prior, then decoder
#
# On the left are pairs that were shown, on the right pairs that were not. Pairs that were shown should come out as asked, in soft
# outlines (this VAE is a quarter of a minute old). Unseen ones are a fair test of whether "blue" and "square" were learned apart. Expect
# right colours or right forms, and both together only now and then.

# %%
from dalle_mini_impl.unclip import draw_embeddings

unclip = TextToImage.from_pretrained(run)
seen = [("red", "circle"), ("green", "triangle"), ("purple", "ring"), ("yellow", "star")]
unseen = sorted(HELD_OUT_PAIRS)[:4]
assert not set(seen) & HELD_OUT_PAIRS
prompts = [named(*pair) for pair in (*seen, *unseen)]
drawn = unclip.draw(prompts, candidates=5, keep=5, seed=0)
show(
    *(
        (row[0].prompt + (" (unseen)" if pair in unseen else ""), [(p.image, f"{p.score:.1f}") for p in row])
        for row, pair in zip(drawn, (*seen, *unseen))
    ),
    cell_px=40,
)

embeddings = draw_embeddings(unclip.bundle, prompts, [(i, 0) for i in range(8)], seed=0, settings=unclip.settings())
fits = embeddings @ unclip.embedder.encode_texts(prompts).t()  # (8, 8)
prior_right = (fits[:4].argmax(dim=1) == torch.arange(4)).sum().item()
print(f"embeddings of the prior for the shown pairs that are nearest to their own caption: {prior_right} of 4")

# %% [markdown]
# ### From a picture: variations
#
# Leave the prior out, and take the embedding of a real picture: the decoder draws what CLIP sees in it, and fills in the
# rest. Colour and form should stay. Place and size may change: captions never told of them, so CLIP had no reason to keep them.

# %%
examples = [one_shape(*pair) for pair in (("red", "heart"), ("cyan", "ring"), ("orange", "square"), ("blue", "square"))]
show(
    *(
        ("", [(example, "picture"), *((p.image, "") for p in unclip.vary(example, candidates=7, keep=7))])
        for example in examples
    ),
    cell_px=48,
)

# %% [markdown]
# ### On the way between two pictures, and along a caption
#
# Embeddings are points on a sphere, so one can walk from one to the other along the great circle (**slerp**, [`unclip.py`](../dalle_mini_impl/unclip.py)), with the same
# noise at each step. And the *difference* of two captions is a direction: turn a picture's embedding from "a red circle" towards "a blue
# circle", and only the colour should change.

# %%
circle, square = one_shape("red", "circle"), one_shape("blue", "square")
way = unclip.interpolate(circle, square, steps=7, candidates=8, keep=1)
strengths = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
change = unclip.change(circle, "a red circle", "a blue circle", strengths=strengths, candidates=8, keep=1)
show(
    (
        "from the red circle to the blue square",
        [(circle, "picture"), *((row[0].image, f"{step}/6") for step, row in enumerate(way)), (square, "picture")],
    ),
    ("red -> blue", [(circle, "picture"), *((row[0].image, f"{s:.1f}") for s, row in zip(strengths, change))]),
    cell_px=56,
    columns=9,
)
first, last = (np.asarray(row[0].image)[10:22, 10:22].reshape(-1, 3).mean(axis=0) for row in (change[0], change[-1]))
print(f"mean colour in the middle (red, green, blue): {first.round().tolist()} -> {last.round().tolist()}")

# %% [markdown]
# ### Captioning: the same stream, the other way round
#
# A fifth of the time this decoder was shown the picture first and had to predict the caption. So it can write one: read the picture's tokens,
# take the likeliest next piece, append it, until the end. Nothing new has to be built for it. The true captions stand in brackets; the
# last pair was never shown.


# %%
@torch.no_grad()
def write_caption(picture, most=8):
    """The likeliest caption of a picture, piece by piece."""
    ids = unclip.tokens_of(picture)[None]
    text = [BOS]
    while text[-1] != EOS and len(text) < most:
        given = torch.tensor([[*text, PAD]])  # the last one is not read
        text.append(unclip.dalle.read_logits(given, ids)[0, -1].argmax().item())
    return unclip.bundle.tokenizer.decode(text)


truths = [
    ("green", "heart"),
    ("pink", "circle"),
    ("yellow", "star"),
    ("red", "ring"),
    ("purple", "triangle"),
    ("blue", "square"),
]
shapes = [one_shape(*pair) for pair in truths]
written = [write_caption(picture) for picture in shapes]
show(("", [(picture, caption) for picture, caption in zip(shapes, written)]), cell_px=112)
for caption, pair in zip(written, truths):
    print(f"{caption:20} ({' '.join(pair)}{', never shown' if pair in HELD_OUT_PAIRS else ''})")

# %% [markdown]
# **Exercises.** 1. `unclip.draw(prompts, settings=unclip.settings(unclip=False))` skips the
# prior. Is the caption alone as good? On pairs that were never shown? 2. Ask for "a green blue star" and for the sum of two embeddings
# (`draw_by_embeddings`). 3. Train with `reading_share=0.5`. Captions get better, what gets worse? 4. Halve the steps of the VAE. Which
# of the later stages suffers most, and why could none of them make up for it?
#
# ## Where to go from here
#
# - your own pictures: `accelerate launch train.py --data FOLDER --out runs/mine --budget 2h` ([README](../README.md), [data.md](data.md));
# - the same five systems as commands: `dalle-mini classify`, `index`, `search`, `score`, `guide`, `vary`, `interpolate`, `change`;
# - why things are as they are: [decisions.md](decisions.md); what was measured: [experiments.md](experiments.md).

# %%
folder.cleanup()
