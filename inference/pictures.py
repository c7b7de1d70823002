"""Pictures of prompts by whatever sampler a model needs: one call for samples and evaluators."""

from inference import infinity, unified

# Keys of config.sample for a user's own pictures. Evaluators draw in the shape of the data's.
SHOWN = ("aspect", "strip")


def sampler(model):
    """The module whose generate_images draws with this model."""
    return infinity if "scale_step" in model.predict else unified


def only_draws(model) -> bool:
    """Whether the model can neither caption pictures nor answer questions about them."""
    return sampler(model) is infinity


def options(config, model, *, shown: bool = True) -> dict:
    """Keyword arguments of generate_images that config.sample sets."""
    keys = [k for k in sampler(model).SAMPLER_KEYS if shown or k not in SHOWN]
    return {k: config.sample[k] for k in keys if k in config.sample}


def generate(config, model, params, tokens, lengths, rng, *, source=None, shown: bool = True):
    """One picture per right-padded prompt, drawn as config.sample says; shown=False: in the data's
    shape whatever it says, and nothing beside the picture."""
    draw, settings = sampler(model).generate_images, options(config, model, shown=shown)
    return draw(model, params, tokens, lengths, rng, source=source, **settings)
