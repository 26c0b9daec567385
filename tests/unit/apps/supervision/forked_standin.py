"""What a fork server's workers run in tests: says where it is, and goes on until told otherwise (start-up speed)."""

import os
import threading
import time

imported_by = os.getpid()

if os.environ.get("STANDIN_THREAD"):  # a server that can't be forked
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


def main() -> int:
    print(f"imported by {imported_by}, I am {os.getpid()} of session {os.getsid(0)}, mood {os.environ.get('MOOD')}", flush=True)
    os.write(int(os.environ["ANTIPHON_EVENTS_FD"]), b'{"event": "ready"}\n')
    if os.environ.get("MOOD") == "short":
        return 7
    if os.environ.get("MOOD") == "busy":
        while True:
            pass
    time.sleep(600)  # until whoever started it ends it
    return 0
