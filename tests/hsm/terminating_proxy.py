"""A proxy that ends TLS, as a process of its own: TLS of its own certificate outside, another TLS connection to the broker.

python terminating_proxy.py BROKER-ADDRESS CERTIFICATE KEY     prints the address it listens on
"""

import asyncio
import ssl
import sys


async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except (ConnectionError, ssl.SSLError):
        pass
    finally:
        writer.close()


async def main(broker, certificate, key):
    outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    outside.load_cert_chain(certificate, key)
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    inside.check_hostname, inside.verify_mode = False, ssl.CERT_NONE
    host, port = broker.rsplit(":", 1)

    async def carry(reader, writer):
        there, onward = await asyncio.open_connection(host, int(port), ssl=inside)
        await asyncio.gather(pump(reader, onward), pump(there, writer))

    server = await asyncio.start_server(carry, "127.0.0.1", 0, ssl=outside)
    at, number = server.sockets[0].getsockname()[:2]
    print(f"{at}:{number}", flush=True)  # noqa: T201 - how the test learns it
    await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
