"""Chat bought without an account by the Python x402 client, over httpx.

FAREBOX_URL RPC_URL WALLET_KEY MODEL
"""

import asyncio
import os

from checks import check, program, same
from eth_account import Account
from x402 import x402Client
from x402.http.clients import x402HttpxClient
from x402.http.utils import decode_payment_response_header
from x402.mechanisms.evm.exact import register_exact_evm_client

account = Account.from_key(os.environ["WALLET_KEY"])


async def ask(**more):
    client = register_exact_evm_client(x402Client(), account)
    body = {"model": os.environ["MODEL"], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64, **more}
    async with x402HttpxClient(client, base_url=os.environ["FAREBOX_URL"], timeout=30) as http:
        return await http.post("/v1/chat/completions", json=body)


@program
def main():
    response = asyncio.run(ask())
    check("the answer is 200", response.status_code == 200, response.text)
    check("it has text", response.json()["choices"][0]["message"]["content"], response.text)
    charged = int(response.headers["X-Charged-Usdc"])
    check("it was charged, and less than was paid", 0 < charged < 10_000, charged)
    receipt = decode_payment_response_header(response.headers["PAYMENT-RESPONSE"])
    check("the receipt header says success", receipt.success, receipt)
    same("the receipt's payer", receipt.payer, account.address)
    stream = asyncio.run(ask(stream=True))
    check("a stream is paid for too", stream.status_code == 200 and stream.text.endswith("data: [DONE]\n\n"), stream.text)
