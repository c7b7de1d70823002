"""Pictures of prompts by whatever sampler a model needs: one call for samples and evaluators."""

from inference import infinity, unified


def sampler(model):
    """The module whose generate_images draws with this model."""
    return infinity if "scale_step" in model.predict else unified


def only_draws(model) -> bool:
    """Whether the model can neither caption pictures nor answer questions about them."""
    return sampler(model) is infinity


def options(config, model) -> dict:
    """Keyword arguments of generate_images that config.sample sets."""
    return {k: config.sample[k] for k in sampler(model).SAMPLER_KEYS if k in config.sample}


def generate(config, model, params, tokens, lengths, rng, *, source=None):
    """One picture per right-padded prompt, drawn as config.sample says."""
    draw = sampler(model).generate_images
    return draw(model, params, tokens, lengths, rng, source=source, **options(config, model))
