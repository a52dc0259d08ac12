import pytest
from minute_model import random_parameters


@pytest.fixture(scope="session")
def params() -> dict:
    return random_parameters(0)
