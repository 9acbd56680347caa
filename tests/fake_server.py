"""A server that answers like OpenAI's and computes nothing; it can fail in several ways.

    python fake_server.py PORT [WAY] [LOG]

With LOG, the bodies of the requests are appended to a file, a line each.
"""

import asyncio
import contextlib
import json
import os
import sys

GAP_S = 0.002  # seconds between two tokens
FEW = 20  # requests after which the way "dies" ends the process


class FakeServer:
    """Streams as many tokens as are asked for, unless `way` spoils it.

    Args:
        way: "" or one of refuses, stalls, breaks, complains, short, silent, dies.
    """

    def __init__(self, way="", log=None):
        self.way, self.log, self.count = way, log, 0

    async def handle(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                size = 0
                if "content-length:" in head:
                    size = int(head.split("content-length:")[1].split("\r\n")[0])
                body = await reader.readexactly(size)
                if "/v1/completions" in head.split("\r\n")[0]:
                    if not await self.complete(json.loads(body), writer):
                        return
                elif "/v1/models" in head:
                    self.reply(writer, 200, {"data": [{"id": "fake", "root": "fake"}]})
                else:
                    self.reply(writer, 404, {"error": {"message": "nothing is there"}})

    def reply(self, writer, status, value):
        data = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)

    async def complete(self, body, writer):
        """Stream a completion; False if the connection is to be closed."""
        self.count += 1
        if self.log:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(body) + "\n")
        if self.way == "dies" and self.count > FEW:
            print("the fake server has had enough", flush=True)
            os._exit(3)
        spoiled = self.way if self.count % 4 == 0 else ""
        if spoiled == "refuses":
            self.reply(writer, 429, {"error": {"message": "the queue is full"}})
            return True
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

        def event(value):
            data = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode())
            data += b"\n\n"
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        count = body["max_tokens"] - (spoiled == "short")
        for i in range(count):
            await asyncio.sleep(GAP_S)
            if i == 2 and spoiled == "stalls":
                await asyncio.sleep(60)
            if i == 2 and spoiled == "breaks":
                return False
            if i == 2 and spoiled == "complains":
                event({"error": {"message": "the engine has failed"}})
                break
            end = "length" if i == count - 1 else None
            event({"choices": [{"index": 0, "text": "a", "finish_reason": end}]})
        if self.way != "silent":
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            event({"choices": [], "usage": usage})
        event(b"[DONE]")
        writer.write(b"0\r\n\r\n")
        return True


async def main(port, way="", log=None):
    fake = FakeServer(way, log)
    server = await asyncio.start_server(fake.handle, "127.0.0.1", int(port))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
