"""UniFluid under the paper's spelling; the same configs as configs/uniflud.py."""

from configs.uniflud import VARIANTS, get_config

__all__ = ["VARIANTS", "get_config"]
