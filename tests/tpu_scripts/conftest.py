import pytest
from slice_stand_in import Slice


@pytest.fixture
def pod(tmp_path):
    pod = Slice(tmp_path)
    yield pod
    pod.close()
