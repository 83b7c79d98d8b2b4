"Processes that a test starts as torchrun does, and stops"
import os
import socket
import sys
import time
import warnings
from multiprocessing import get_all_start_methods, get_context

import torch

def _child(env, log, job, words):
    "What a process does: it has its own environment, and writes to a file"
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(out, number)
        setattr(sys, name, open(number, 'w', closefd=False, buffering=1))
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    job(*words)


def started(job, words, log, how=None):
    "Two processes with the environment that torchrun gives them; forked where they can be, since imports take longer than the work"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(s.getsockname()[1])}
    context = get_context(how or ('fork' if 'fork' in get_all_start_methods() else 'spawn'))
    each = [{**env, 'RANK': str(n), 'LOCAL_RANK': str(n)} for n in range(2)]
    both = [context.Process(target=_child, args=(e, f'{log}-{e["RANK"]}', job, words)) for e in each]
    for p in both: p.start()
    return both


def ended(both, seconds=300):
    "Exit codes; what still runs after so many seconds hangs"
    end = time.time() + seconds
    for p in both: p.join(max(0, end - time.time()))
    codes = [p.exitcode for p in both]
    for p in both: p.kill()
    return codes
