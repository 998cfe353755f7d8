"""The app's output passes unchanged and at once; Flower's and Ray's does not."""

from __future__ import annotations

import pytest

from simulations.flower_output import AppOutput

info = "\x1b[92mINFO \x1b[0m:      "
warning = "\x1b[93mWARNING \x1b[0m:   "
error = "\x1b[91mERROR \x1b[0m:     "
worker = "\x1b[36m(ClientAppActor pid=12)\x1b[0m "

noise = (
    "Using SuperLink: run (127.0.0.1:39549)\n"
    "Successfully started run 380771358480518726\n"
    f"{info}Starting Flower Simulation\n"
    f"{info}\tflwr federation simulation-config @none/default <superlink> --num-supernodes <N>\n"
    "Successfully installed trivial-app to somewhere.\n"
    f"{error}Simulation raised an exception\n"
    "Traceback (most recent call last):\n"
    '  File "server.py", line 27, in main\n'
    "    raise RuntimeError('boom')\n"
    "\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=6306, ip=192.0.2.2)\n"
    "RuntimeError: boom\n"
    "\n"
    "The above exception was the direct cause of the following exception:\n"
    "flwr.clientapp.client_app.ClientAppException: \n"
    "Exception ClientAppException occurred. Message: boom\n"
    f"{worker}a client's line\n"
    f"{worker}{info}a client's record\n"
    f"{error}An exception was raised when processing a message by RayBackend\n"
    f"{error}The actor died unexpectedly before finishing this task.\n"
    "\tclass_name: ClientAppActor\n"
    "The actor is dead because its worker process has died.\n"
    f"{error}Exit Code: 700\n"
    "\n"
    "An unhandled exception occurred when running the simulation.\n"
    f"{warning}DEPRECATED FEATURE: x\n"
    "\n            This is a deprecated feature.\n        \n"
    "\x1b[33m(raylet)\x1b[0m A worker died\n"
)
app = "round 1/3\n  loss 0.5\n\nError rate 3 %\nSuccess\n(4 clients)\n"


def run(text: str, *, piece: int) -> str:
    output = AppOutput()
    shown = "".join(output.feed(text[start : start + piece]) for start in range(0, len(text), piece))
    return shown + output.flush()


@pytest.mark.parametrize("piece", [1, 7, 64, 10_000])
def test_app_output_passes_and_noise_does_not(piece):
    assert run(app, piece=piece) == app
    assert run(noise, piece=piece) == ""


@pytest.mark.parametrize("piece", [7, 64, 10_000])
def test_mixed(piece):
    assert run(f"round 1\n{noise}round 2\n{info}x\nround 3", piece=piece) == "round 1\nround 2\nround 3"


def test_indented_output_after_a_dropped_line_passes():
    assert run(f"{info}Starting Flower Simulation\n  indented\n", piece=1000) == "  indented\n"


def test_progress_bars_are_live():
    output = AppOutput()
    assert output.feed("\rstep 1") == "\rstep 1"
    assert output.feed("\rstep 2") == "\rstep 2"
    assert output.feed(f"{worker}in between\n") == ""
    assert output.feed("\rstep 3\n") == "\rstep 3\n"


def test_progress_bar_that_begins_like_a_message_of_flower():
    output = AppOutput()
    assert output.feed("Success") == ""
    assert output.feed("ion 10%") == "Succession 10%"
