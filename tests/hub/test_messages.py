"""What is said when the stand-in of the hub refuses."""

import pytest
from hub_server import READ, HubServer, in_process

from pixart_jax.errors import UserError
from pixart_jax.hub import downloads
from pixart_jax.hub.downloads import local, pinned


@pytest.fixture
def server(tmp_path):
    with HubServer() as found, in_process(found, tmp_path / "home"):
        yield found


def test_errors_say_what_to_do(server, monkeypatch):
    commit = server.add("a/b", {"x.json": b"{}"})
    server.add("a/gated", {"x.json": b"{}"}, gated=True)
    server.add("a/private", {"x.json": b"{}"}, private=True)
    page = server.endpoint

    def fails(path, text):
        downloads._found.cache_clear()
        with pytest.raises(UserError, match=text) as error:
            local(path)
        assert "\n" not in str(error.value)

    fails("hub:a/none", rf"'hub:a/none': {page}/a/none does not exist, or .*not logged in: .*hf auth login")
    fails("hub:PixArt-alpha/PixArt-XL-2-512", r"Did you mean 'hub:PixArt-alpha/PixArt-XL-2-512x512'\?")
    fails("hub:a/private", "it is private and you are not logged in")
    fails("hub:a/gated", rf"accepted its licence: accept it on {page}/a/gated with your account, and log in")
    fails("hub:a/b@v9", "there is no revision 'v9'; it has main")
    fails(f"hub:a/b@{'0' * 40}", "there is no revision '0000")
    fails("hub:a/b/y.json", r"no such folder or file; a/b has x.json. Did you mean 'x.json'\?")
    monkeypatch.setenv("HF_TOKEN", READ)
    fails("hub:a/none", "or your token may not see it")
    fails("hub:a/gated", "with the account of your token")
    downloads._found.cache_clear()
    assert local("hub:a/private").is_dir()
    server.accepted.add(READ)
    assert local("hub:a/gated").is_dir()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    fails("hub:a/b@main", "does not accept your token")
    assert pinned(f"hub:a/b@{commit}")
