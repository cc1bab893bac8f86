"""A top-up paid by the Python x402 client, over httpx. Left alone it pays at most $1, so its owner allows it more.

FAREBOX_URL RPC_URL WALLET_KEY [TOPUP_USD]
"""

import asyncio
import os
import re
from decimal import Decimal

import httpx
from checks import check, program, same
from eth_account import Account
from x402 import x402Client
from x402.http.clients import x402HttpxClient
from x402.http.utils import decode_payment_response_header
from x402.mechanisms.evm.exact import register_exact_evm_client

USDC = "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913"
BALANCE_OF = "0x70a08231"

account = Account.from_key(os.environ["WALLET_KEY"])
usd = os.environ.get("TOPUP_USD", "2")
paid_micro = int(Decimal(usd) * 10**6)


def usdc_micro():
    call = {"to": USDC, "data": BALANCE_OF + account.address[2:].lower().zfill(64)}
    request = {"jsonrpc": "2.0", "id": 1, "method": "eth_call", "params": [call, "latest"]}
    return int(httpx.post(os.environ["RPC_URL"], json=request, timeout=20).json()["result"], 16)


async def topup():
    client = register_exact_evm_client(x402Client(), account)
    client.set_spend_controls({"max_amount_per_payment": f"${usd}"})
    async with x402HttpxClient(client, base_url=os.environ["FAREBOX_URL"], timeout=30) as http:
        return await http.post("/v1/topup", json={"amount": usd})


@program
def main():
    before = usdc_micro()
    response = asyncio.run(topup())
    check("the top-up is answered 200", response.status_code == 200, response.text)
    body = response.json()
    same("credited_usdc", body["credited_usdc"], paid_micro)
    same("wallet", body["wallet"], account.address)
    check("tx_hash is a transaction hash", re.fullmatch(r"0x[0-9a-f]{64}", body["tx_hash"]), body)
    check("balance_usdc holds the credit", body["balance_usdc"] >= paid_micro, body)
    receipt = decode_payment_response_header(response.headers["PAYMENT-RESPONSE"])
    check("the receipt header says success", receipt.success, receipt)
    same("the receipt's transaction", receipt.transaction, body["tx_hash"])
    same("the receipt's payer", receipt.payer, account.address)
    same("the wallet's USDC on the chain fell by", before - usdc_micro(), paid_micro)
