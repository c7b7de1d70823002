"""Runs the checks of seven_checks.py for every implementation and shape of a subclass."""

import re

import pytest

from tests.kernels.seven_checks import Checks

# What other tests of the plain run cover as well: rows of one document beside rows of several,
# second shapes of float64 gradients, first and last cuts of a row, 8 devices, where models and the
# mLSTM run on them too, further sizes of heads, and the v5p and v6e beside the v5e.
LONG = re.compile(
    r"test_(selective_scan|ssd)\.py.*(-False\]|\[False|autodiff_of_ref\[shape[02-9]|eight_devices)"
    r"|test_attention_backends\.py.*eight_devices"
    r"|test_bitwise\.py.*(eight_devices_equal_one|autodiff_of_ref\[shape[02-9]|float32_gradients)"
    r"|test_bitwise\.py.*gpu_equals_ref\[56"
    r"|test_mlstm\.py.*(gpu_equals_ref\[False|-False\]|autodiff_of_ref\[shape[02-9])"
    r"|calls_(equal_steps|follow_each_other)\[(\w+-)?(1|20)\]"
    r"|test_selective_scan\.py.*gpu_equals_ref\[bfloat16"
    r"|test_bitwise\.py.*fused_equals_plain\[\w+-(16|32|56)"
    r"|test_ssd\.py.*does_not_cancel_in_bfloat16\[gpu"
    r"|compiles_at.*\[v(5p|6e)"
    r"|test_bitwise\.py.*hopper_compiles.*\[2048-(8|64)"
    r"|test_selective_scan\.py.*hopper_compiles.*\[float32"
    r"|test_attention\.py.*xla_equals_ref\[shape[13]"
    r"|test_attention_backends\.py.*splash_equals_ref\[shape[13]"
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
