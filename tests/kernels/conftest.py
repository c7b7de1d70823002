"""Runs the checks of seven_checks.py for every implementation and shape of a subclass."""

from tests.kernels.seven_checks import SevenChecks


def pytest_generate_tests(metafunc):
    """The arguments of a check are filled from its class."""
    checks = metafunc.cls
    if checks is None or not issubclass(checks, SevenChecks):
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
