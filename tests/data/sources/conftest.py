import pytest
from source_files import crops


@pytest.fixture
def files():
    return crops()
