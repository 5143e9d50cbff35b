"""Whether the hub can be reached, asked once and within seconds instead of a minute of retries."""

import threading
import urllib.error
import urllib.request
from functools import cache

import huggingface_hub.constants

ENDPOINT = huggingface_hub.constants.ENDPOINT
TIMEOUT = 8  # seconds in all, name resolution included


@cache
def reachable() -> bool:
    """One request to the hub. Where it fails, the hub's libraries are told to use their caches and not to retry."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe():
        try:
            urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=TIMEOUT).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500 or error.code in (403, 407):  # a proxy's refusal is not the hub's answer
                return
        except OSError:
            return
        answered.set()

    # A thread of its own, because a name look-up that hangs knows no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if not answered.is_set():
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return answered.is_set()
