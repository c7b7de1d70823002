"""Defaults of `config.evaluation`, the only place where they are written down.

Not a training config: `configs/common.py:base()` includes `eval_config()`; each system's config
overrides what it needs. Which evaluators run is `config.evals`, when is `config.eval_every`; how
pictures are drawn (guidance, steps, temperature, ...) is `config.sample`.
"""

import ml_collections


def eval_config(**overrides) -> ml_collections.ConfigDict:
    """Returns the evaluation defaults with overrides applied."""
    config = ml_collections.ConfigDict(
        dict(
            held_out="test",  # split never trained on: test | validation
            seed=0,  # of prompts, distractors and questions; not the run's, so seeds compare
            batch=64,  # pictures or texts per compiled call; the last one is padded and masked
            languages=("en", "es", "fr", "de", "ru", "ja"),  # of captions; others are left out
            captions=128,  # captioned glyphs per split, the languages in turn
            questions=192,  # questions about held-out scenes
            prompts=64,  # captions per split to draw; retrieval, kid and sheets share them
            prompt_languages=("en",),  # of those captions, in turn
            language_glyphs=3,  # training pictures asked for in every language of the data
            draw_batch=128,  # pictures per compiled call of the sampler
            candidates=64,  # retrieval: the own glyph and this minus one others
            classifier="",  # weights of the glyph classifier; "" takes the shipped ones
            pictures=256,  # real glyphs of each side of kid, pictures of reconstruction
            perceptual=False,  # reconstruction: LPIPS and KID too (the eval extra)
            edits=24,  # edited scenes of each kind
            gradient_examples=8,  # of each task in the batch of the gradient comparison
            loss_batches=4,  # of `batch` rows per split: losses
            windows=512,  # packed windows of held-out text: bits_per_byte
            contexts=(1024, 8192),  # tokens behind which a step of decoding is timed: speed
            ranked=dict(  # ranked: multiple-choice items, scored as continuations
                source="",  # file of JSON lines; "" makes items of the held-out texts
                tasks=("definition", "continuation", "order"),  # which items are made
                count=256,  # items of each of them ...
                choices=4,  # ... with so many options
                space="counted",  # in front of an option: counted | scored (no byte) | none
            ),
            trunk="decoder",  # params[trunk] is what the two losses share
            sheet=24,  # pictures per contact sheet
            sheet_languages=("en", "es", "de", "fr", "ru", "ja", "ar"),
            table=dict(  # the report ablation_table
                metrics=("",)[:0],  # columns; () = the headlines that every run has
                title="",
            ),
        )
    )
    config.update(overrides)
    return config
