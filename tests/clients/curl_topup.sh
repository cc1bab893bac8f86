#!/usr/bin/env bash
# A top-up with nothing but curl and a signature: the terms, the payment, and the same payment once more.
#   FAREBOX_URL WALLET_KEY API_KEY [TOPUP_USD]      API_KEY is of the wallet of WALLET_KEY
set -euo pipefail
here=$(dirname "$0")
usd=${TOPUP_USD:-2}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
# The signer is the one that the page shows. It reads version 1, which a top-up speaks where it is asked to.
node "$here/run_docs.mjs" --files "$here/../../docs/CURL.md" "$tmp"

fail() { echo "FAILED: $1: $(cat "$tmp/body")" >&2; exit 1; }
field() { node -p "const v = JSON.parse(fs.readFileSync(0))$1; typeof v === 'object' ? JSON.stringify(v) : v"; }
# Leaves the body in $tmp/body, the headers in $tmp/headers, and prints the status.
topup() {
  curl -sS --max-time 30 -D "$tmp/headers" -o "$tmp/body" -w '%{http_code}' \
    -X POST "$FAREBOX_URL/v1/topup?x402=1" -d "{\"amount\": $usd}" "$@"
}
balance() {
  local wallet=$1
  curl -sS --max-time 30 -H "Authorization: Bearer $API_KEY" "$FAREBOX_URL/v1/usage/$wallet" | field .balance_usdc
}

[ "$(topup)" = 402 ] || fail "no payment, no 402"
grep -qi '^payment-required: ' "$tmp/headers" || fail "the 402 has no PAYMENT-REQUIRED header"
echo "ok  402 asks for $(field .accepts[0].maxAmountRequired <"$tmp/body") micro-USDC"

payment=$(node "$tmp/sign.mjs" <"$tmp/body")
[ "$(topup -H "X-Payment: $payment")" = 200 ] || fail "the payment was not taken"
first=$(field .topup_id <"$tmp/body")
wallet=$(field .wallet <"$tmp/body")
credited=$(balance "$wallet")
echo "ok  paid: top-up $first, the balance is $credited micro-USDC"

[ "$(topup -H "X-Payment: $payment")" = 200 ] || fail "the same payment again was not answered 200"
[ "$(field .topup_id <"$tmp/body")" = "$first" ] || fail "the same payment again is not top-up $first"
[ "$(balance "$wallet")" = "$credited" ] || fail "the same payment again changed the balance from $credited"
echo "ok  the same header again: still top-up $first, no second credit"
