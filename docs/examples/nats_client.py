# python nats_client.py NATS_URL PROMPT: the URL is another at each start, `heddle up` and `heddle status --json` tell it
import asyncio
import sys

import msgpack
import nats


async def give_up(error: Exception) -> None:  # without it the client tries again for two minutes
    sys.exit(f"nats_client.py: {str(error) or repr(error)}")


async def main(url: str, prompt: str) -> None:
    async with await nats.connect(url, connect_timeout=3, allow_reconnect=False, error_cb=give_up) as client:
        stream = await client.subscribe(inbox := client.new_inbox())
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64, "temperature": 0, "slo": {"tpot_ms": 100}}
        await client.publish("heddle.v1.generate", msgpack.packb(body), reply=inbox)
        while data := (await stream.next_msg(timeout=60)).data:  # an empty message ends the stream
            chunk = msgpack.unpackb(data)
            print(chunk["choices"][0]["delta"]["content"] if "choices" in chunk else chunk, end="", flush=True)


url, prompt = sys.argv[1:] if len(sys.argv) == 3 else sys.exit("usage: python nats_client.py NATS_URL PROMPT")
try:
    asyncio.run(main(url, prompt))
except nats.errors.Error as error:
    sys.exit(f"nats_client.py: {error}")
