# python nats_client.py NATS_URL PROMPT: the URL is another at each start, `heddle up` and `heddle status --json` tell it
import asyncio
import sys

import msgpack
import nats


async def main(url: str, prompt: str) -> None:
    async with await nats.connect(url) as client:
        stream = await client.subscribe(inbox := client.new_inbox())
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64, "temperature": 0, "slo": {"tpot_ms": 100}}
        await client.publish("heddle.v1.generate", msgpack.packb(body), reply=inbox)
        while data := (await stream.next_msg(timeout=60)).data:  # an empty message ends the stream
            chunk = msgpack.unpackb(data)
            print(chunk["choices"][0]["delta"]["content"] if "choices" in chunk else chunk, end="", flush=True)


asyncio.run(main(*sys.argv[1:]))
