"""The contract kit of gsa-platform on attention=moba."""

import pytest

from gsa_platform.testing import attention_checks


@pytest.mark.parametrize("check", attention_checks("moba"), ids=str)
def test_contract(check):
    check()
