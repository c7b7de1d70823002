"""Runs the checks of seven_checks.py for every implementation and shape of a subclass."""

import re

import pytest

from tests.kernels.seven_checks import Checks

# What other tests of the plain run cover as well: rows of one document beside rows of several,
# second shapes of float64 gradients, 8 devices, where models and the mLSTM run on them too, and the
# v5p beside the v5e.
LONG = re.compile(
    r"test_(selective_scan|ssd)\.py.*(-False\]|\[False|autodiff_of_ref\[shape[02-9]|eight_devices)"
    r"|test_attention_backends\.py.*eight_devices"
    r"|test_bitwise\.py.*(eight_devices_equal_one|autodiff_of_ref\[shape[02-9]|float32_gradients)"
    r"|test_bitwise\.py.*gpu_equals_ref\[56"
    r"|test_mlstm\.py.*gpu_equals_ref\[False"
    r"|test_(selective_scan|ssd|attention_backends|attention_scales)\.py.*compiles.*\[v5p"
    r"|test_attention_scales\.py.*(splash_equals_ref\[shape[3-9]|xla_equals_ref\[shape[23])"
    r"|test_attention_scales\.py.*cudnn_by_scale.*\[(320|120)"
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks `long`."""
    for item in items:
        if LONG.search(item.nodeid):
            item.add_marker(pytest.mark.long)


def pytest_generate_tests(metafunc):
    """The arguments of a check are filled from its class."""
    checks = metafunc.cls
    if checks is None or not issubclass(checks, Checks):
        return
    values = dict(
        impl=checks.IMPLS,
        shape=checks.SHAPES,
        gradient_shape=checks.GRADIENT_SHAPES,
        documents=(False, True),
        cut=(1, 16, 20),
    )
    for name, choices in values.items():  # in the same order in every process
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, choices)
