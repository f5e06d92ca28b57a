"""Tasks of the processes in tests/data/test_workers.py, which import nothing else of the tests."""

import os
import signal
import time


def respond(question):
    """Answer, fail, die, leave or sleep, as the question says."""
    if question == "pid":
        return os.getpid()
    if isinstance(question, type):
        raise question("what is wrong")
    if question == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if question == "leave":
        os._exit(3)
    if question == "sleep":
        time.sleep(60)
    return question
