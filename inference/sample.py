"""What a model says and draws for a user's prompts and pictures, written as files."""

import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from inference import drawing, pictures, unified, writing
from input_pipeline import layout, text_embeddings
from models.tokenizers.autoencoder import psnr, to_float, to_uint8


def write(config, model, params, *, tokenizer, step, rng, workdir) -> None:
    """Draw config.sample.prompts into samples/prompts-<step>.png, as the loop does on its way, and
    with config.sample.strip how they grew into prompts-<step>-scales.png.

    A language model continues them in samples/prompts-<step>.txt.
    """
    prompts = list(config.sample.prompts)
    if writing.is_writer(model):
        path = Path(workdir) / "samples" / f"prompts-{step}.txt"
        common = dict(tokenizer=tokenizer, prompts=prompts, rng=rng, path=path)
        writing.write(config, model, params, **common)
        return
    drawn = draw(config, model, params, tokenizer, prompts, rng)
    folder = Path(workdir) / "samples"
    if jax.process_index() == 0:
        _sheet(folder / f"prompts-{step}.png", f"step {step}", prompts, drawn.images)
        _strip(folder / f"prompts-{step}-scales.png", f"step {step}", prompts, drawn)


def respond(config, model, params, *, tokenizer, step, rng, workdir, prompts, images) -> list[Path]:
    """Mode sample: prompts become pictures; pictures get captions, answers or edits.

    Without pictures every prompt is drawn. With pictures every prompt is a question about each of
    them (an edit where the config trains edits), and no prompt asks for captions. A language model
    continues every prompt, an image tokenizer rebuilds every picture.
    Returns the files written.
    """
    folder = Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    if writing.is_writer(model):
        if images:
            raise ValueError("--image: this model reads and writes text only")
        given = dict(tokenizer=tokenizer, prompts=prompts or list(config.sample.prompts), rng=rng)
        path = folder / f"sample-{step}.txt"
        return writing.write(config, model, params, path=path, stream=True, **given)
    if "reconstruct" in model.predict:
        if prompts or not images:
            raise ValueError("an image tokenizer rebuilds pictures: give --image=FILE, no --prompt")
        return _write_rebuilt(config, model, params, images, folder, step)
    if "init_cache" not in model.predict:
        raise ValueError("this model neither draws nor writes")
    common = (config, model, params, tokenizer)
    if not images:
        prompts = prompts or list(config.sample.prompts)
        if not prompts:
            raise ValueError("nothing to draw: give --prompt=TEXT or set config.sample.prompts")
        return _write_drawn(*common, prompts, rng, folder, step)
    if pictures.only_draws(model):
        raise ValueError("--image: this model draws pictures from text only")
    if config.data.get("edit") and prompts:
        return _write_edits(*common, prompts, images, rng, folder, step)
    return _write_answers(*common, prompts, images, folder, step)


def draw(config, model, params, tokenizer, prompts, rng, source=None):
    """One picture per prompt with the sampler settings of config.sample."""
    asked = _encode(config, tokenizer, prompts)
    return pictures.generate(config, model, params, *asked, rng, source=source)


def _encode(config, tokenizer, prompts) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, lengths) of prompts, or what an encoder says of them in place of the tokens."""
    if config.data.text_embeddings:
        return text_embeddings.prompts(config, prompts)
    encoded = [layout.encode_prompt(tokenizer, p, config.data.prompt_length) for p in prompts]
    for prompt, one in zip(prompts, encoded):
        if one.truncated:
            print(f"prompt cut to {config.data.prompt_length} tokens: {prompt!r}")
    lengths = np.array([e.length for e in encoded], np.int32)
    return np.stack([e.tokens for e in encoded]), lengths


def answer(config, model, params, tokenizer, pictures, questions) -> list[str]:
    """Answers by config.sample.beams, one per (picture uint8 [s, s, 3], question)."""
    encoded = [layout.encode_question(tokenizer, q, config.data.text_length) for q in questions]
    ids = unified.generate_text(
        model,
        params,
        np.stack(pictures),
        np.stack([e.tokens for e in encoded]),
        np.array([e.length for e in encoded], np.int32),
        max_new=config.sample.max_new,
        beams=config.sample.get("beams", 1),
    )
    return [tokenizer.decode(row.tolist()) for row in np.asarray(ids)]


def read_picture(path: str, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a file; transparency is put on white."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--image={path} is not a file")
    try:
        with Image.open(path) as image:
            rgba = image.convert("RGBA")
    except OSError as error:
        raise ValueError(f"--image={path} is not a picture that can be read") from error
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return np.asarray(white.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _write_drawn(config, model, params, tokenizer, prompts, rng, folder, step):
    drawn = draw(config, model, params, tokenizer, prompts, rng)
    sheet = _sheet(folder / f"sample-{step}.png", f"step {step}", prompts, drawn.images)
    files = [sheet]
    for i, image in enumerate(np.asarray(drawn.images)):
        files.append(folder / f"sample-{step}-{i}.png")
        Image.fromarray(image).save(files[-1])
    record = [{"prompt": p, "file": f.name} for p, f in zip(prompts, files[1:])]
    if hasattr(drawn, "order"):  # of a picture's tokens, one after the other
        record = [r | {"order": o.tolist()} for r, o in zip(record, np.asarray(drawn.order))]
    files += _strip(folder / f"sample-{step}-scales.png", f"step {step}", prompts, drawn)
    files.append(folder / f"sample-{step}.json")
    files[-1].write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    return files


def _write_answers(config, model, params, tokenizer, prompts, images, folder, step):
    questions = prompts or [layout.caption_question(lang) for lang in config.data.langs]
    size = config.data.und_size or config.data.image_size
    asked = [(path, question) for path in images for question in questions]
    read = {path: read_picture(path, size) for path in images}
    said = answer(
        config, model, params, tokenizer, [read[p] for p, _ in asked], [q for _, q in asked]
    )
    lines = [f"{path}\t{question}\t{text}" for (path, question), text in zip(asked, said)]
    print("\n".join(lines))
    out = folder / f"sample-{step}.txt"
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [out]


def _write_edits(config, model, params, tokenizer, prompts, images, rng, folder, step):
    asked = [(path, prompt) for path in images for prompt in prompts]
    generate, see = config.model.image_size, config.data.und_size or config.data.image_size
    seen = np.stack([read_picture(path, see) for path, _ in asked])
    before = np.stack([read_picture(path, generate) for path, _ in asked])
    tokens = model.predict["encode_latents"](params, to_float(before))
    drawn = draw(
        config, model, params, tokenizer, [p for _, p in asked], rng, source=(seen, tokens)
    )
    cells = [
        ((old, new), prompt)
        for old, new, (_, prompt) in zip(before, np.asarray(drawn.images), asked)
    ]
    out = folder / f"edit-{step}.png"
    drawing.picture_grid(out, f"step {step}: before, after", [("edits", cells)], columns=4)
    return [out]


def _write_rebuilt(config, model, params, images, folder, step):
    before = np.stack([read_picture(path, config.data.image_size) for path in images])
    seen = to_float(before)
    after = jax.jit(model.predict["reconstruct"])(params, seen)
    decibels = np.asarray(psnr(seen, after))
    pixels = np.asarray(to_uint8(after))
    texts = [f"{Path(path).name}: {d:.1f} dB" for path, d in zip(images, decibels)]
    print("\n".join(texts))
    files = [folder / f"rebuilt-{step}.png"]
    cells = [((a, b), text) for a, b, text in zip(before, pixels, texts)]
    drawing.picture_grid(files[0], f"step {step}: before, after", [("pictures", cells)], columns=4)
    for i, picture in enumerate(pixels):
        files.append(folder / f"rebuilt-{step}-{i}.png")
        Image.fromarray(picture).save(files[-1])
    return files


def _strip(path, title, prompts, drawn) -> list[Path]:
    """A sheet of the pictures after each scale, where the sampler was asked for them."""
    if getattr(drawn, "strip", None) is None:
        return []
    cells = list(zip(np.asarray(drawn.strip).swapaxes(0, 1), prompts))
    sections = [("drawn from the captions", cells)]
    drawing.picture_grid(path, f"{title}: after each scale", sections, columns=2)
    return [path]


def _sheet(path, title, prompts, images) -> Path:
    cells = [((image,), prompt) for image, prompt in zip(np.asarray(images), prompts)]
    drawing.picture_grid(path, title, [("drawn from the captions", cells)], columns=8)
    return path
