"""Two threads sign and generate in one token. Run as a process of its own: `two_threads.py conf pin-file safe|trap`.

`safe` opens the token as the product does; `trap` initialises as python-pkcs11 does by itself. Exit 0 if all went well.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from pathlib import Path

from moorline.hsm.keys import TokenEcKey
from moorline.hsm.token import TokenLocation, native, open_token, softhsm_module
from moorline.wire import keys


def _nothing(_: object) -> None:
    """Stands for the module's own C_Finalize and C_Initialize, which the trap leaves out."""


def main(conf: str, pin_file: str, way: str) -> int:
    module = softhsm_module()
    if way == "trap":
        native.NativeModule.finalize = _nothing
        native.NativeModule.initialize_for_threads = _nothing
    location = TokenLocation(module=module, label="threads", pin_file=Path(pin_file), environment={"SOFTHSM2_CONF": conf})
    failed = []
    with open_token(location) as token:
        signer = keys.KeySigner(TokenEcKey(token, "signer"))
        public = signer.public_key()

        def work(seed: int) -> None:
            for number in range(1500):
                message = hashlib.sha256(bytes([seed]) + number.to_bytes(4, "big")).digest()
                try:
                    keys.verify(public, signer.sign(message), message)
                    token.seal("wrapping", token.random(32), b"here")
                except Exception as error:
                    failed.append(error)
                    return

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return len(failed)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
