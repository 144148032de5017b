"""Starts scripts as processes of their own without seconds of imports each: python tests/forker.py

Imports what the scripts import, once, and forks a child for each request, a line of JSON on stdin.
The child runs the script as Python would, to the end of its interpreter: an abort there shows in
its exit code. A request names arguments, cwd, stdout and stderr, and maybe signals ({function of
common.py: [number of the call, signal, ...]}), linger (a function of common.py) and file_limit
(bytes); it is answered by a process id. {"wait": id} is answered by the exit code, or minus the
number of the signal that ended it.
"""

import functools
import itertools
import json
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

import torch


def send_signals(name, number, *signals):
    """Has the process signal itself at the `number`th call of a function of common.py."""
    function, calls = getattr(common, name), itertools.count(1)

    @functools.wraps(function)
    def wrapper(*arguments, **settings):
        if next(calls) == number:
            for each in signals:
                os.kill(os.getpid(), each)
        return function(*arguments, **settings)

    setattr(common, name, wrapper)


def linger(name):
    """Has a function of common.py work in torch for a second or so before it does its own."""
    function = getattr(common, name)

    @functools.wraps(function)
    def wrapper(*arguments, **settings):
        for _ in range(300):
            torch.ones(500_000).add_(1)
        return function(*arguments, **settings)

    setattr(common, name, wrapper)


for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    else:
        answer = os.fork()
    if answer == 0 and "wait" not in request:  # the child
        os.chdir(request["cwd"])
        # CPython keeps what it read ahead of stdin in a buffer; the child must not.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, name in [(1, "stdout"), (2, "stderr")]:
            if request[name] is None:
                os.close(descriptor)
                setattr(sys, name, None)
            else:
                os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit := request.get("file_limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for function, call in request.get("signals", {}).items():
            send_signals(function, *call)
        if name := request.get("linger"):
            linger(name)
        sys.argv = request["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        break
    print(answer, flush=True)
