"""Nothing meets a tensor of another device: the cases of `placement.py`, in a process of their own, since PyTorch counts devices once, at
the first backward pass"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_nothing_meets_another_device():
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-n', '0', '-q', '--tb=short', '-p', 'no:cacheprovider', str(HERE / 'placement.py')],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')])},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if ' passed' not in done.stdout: pytest.skip('this PyTorch has no devices of Python')
