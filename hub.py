"""Find out in seconds, not after a minute of retries, if the hub can be reached; and pin datasets to a commit."""

import re
import threading
from functools import cache

import huggingface_hub.constants

from errors import UserError, first_line

ENDPOINT = huggingface_hub.constants.ENDPOINT
TIMEOUT = 8  # seconds in all, name resolution included


@cache
def reachable() -> bool:
    """Whether the hub answers one request. If not, its libraries are told to use their caches and not to retry."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe():
        try:  # by the client that downloads, which knows the certificates and proxies that it needs
            status = huggingface_hub.get_session().head(ENDPOINT, timeout=TIMEOUT).status_code
        except Exception:  # several libraries raise here; any error means no answer
            return
        if status < 500 and status not in (403, 407):  # a proxy's refusal is not the hub's answer
            answered.set()

    # A thread of its own, because no timeout ends a name look-up that hangs.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if not answered.is_set():
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return answered.is_set()


def pinned(spec: str) -> str:
    """hub:OWNER/NAME -> hub:OWNER/NAME@COMMIT with the newest commit, so that whoever reads it later reads the same.
    Any other source, and one that names its commit already, is returned as it is.

    Raises:
        UserError: `spec` is malformed, or the hub cannot be reached or has no such dataset.
    """
    if not spec.startswith("hub:"):
        return spec
    named = re.fullmatch(r"hub:(\w[\w.-]*/\w[\w.-]*)(@[0-9a-f]{40})?", spec)
    if not named:
        raise UserError(f"{spec}: a dataset on the hub is written hub:OWNER/NAME, or hub:OWNER/NAME@COMMIT")
    if not reachable():
        raise UserError(f"{spec}: the hub cannot be reached; name files or folders instead")
    if named[2]:
        return spec
    from huggingface_hub import HfApi

    try:
        return f"{spec}@{HfApi(endpoint=ENDPOINT).dataset_info(named[1]).sha}"
    except Exception as error:  # several libraries raise here; any error means no dataset
        raise UserError(f"cannot read {spec}: {first_line(error)}") from error
