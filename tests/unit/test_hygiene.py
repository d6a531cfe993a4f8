"""What the test suite promises about itself: no network, and no use of what dependencies are about to drop."""

from __future__ import annotations

import socket
import warnings

import pytest


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_other_machines_are_out_of_reach(kind: int) -> None:
    # 192.0.2.0/24 is reserved for documentation: nothing answers there anyway.
    with socket.socket(socket.AF_INET, kind) as opened:
        for reach in (opened.connect, opened.connect_ex, lambda address: opened.sendto(b"x", address)):
            with pytest.raises(AssertionError, match="tests run without network"):
                reach(("192.0.2.1", 80))


def test_this_machine_is_in_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"x")
        assert server.accept()[0].recv(1) == b"x"


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_warning_about_our_own_use_is_an_error(category: type[Warning]) -> None:
    with pytest.raises(category):
        warnings.warn_explicit("on its way out", category, "module.py", 1, module="safelight.anything")


def test_what_dependencies_do_inside_themselves_is_not() -> None:
    with pytest.warns(DeprecationWarning, match="on its way out"):
        warnings.warn_explicit("on its way out", DeprecationWarning, "module.py", 1, module="lightning.anything")
