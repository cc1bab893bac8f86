#!/usr/bin/env bash
# An answer and a stream bought with nothing but curl and signatures, and the same header once more.
#   FAREBOX_URL WALLET_KEY MODEL
set -euo pipefail
here=$(dirname "$0")
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
# The signer is the one that the page shows.
node "$here/run_docs.mjs" --files "$here/../../docs/CURL.md" "$tmp"

fail() { echo "FAILED: $1: $(cat "$tmp/body")" >&2; exit 1; }
header() { tr -d '\r' <"$tmp/headers" | sed -n "s/^$1: //Ip"; }
stream=false
# Leaves the body in $tmp/body, the headers in $tmp/headers, and prints the status.
ask() {
  curl -sSN --max-time 30 -D "$tmp/headers" -o "$tmp/body" -w '%{http_code}' "$FAREBOX_URL/v1/chat/completions" \
    -d "{\"model\": \"$MODEL\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}], \"max_tokens\": 64,
         \"stream\": $stream}" "$@"
}

[ "$(ask)" = 402 ] || fail "no payment, no 402"
echo "ok  402 without a payment"
payment=$(node "$tmp/sign.mjs" <"$tmp/body")
[ "$(ask -H "X-Payment: $payment")" = 200 ] || fail "the payment was not taken"
charged=$(header x-charged-usdc) balance=$(header x-balance-usdc)
cp "$tmp/body" "$tmp/first"
echo "ok  answered for $charged micro-USDC; $balance are left"
[ "$(ask -H "X-Payment: $payment")" = 200 ] || fail "the same payment again was not answered 200"
cmp -s "$tmp/body" "$tmp/first" || fail "the same payment again is another answer"
[ "$(header x-balance-usdc)" = "$balance" ] || fail "the same payment again changed the balance from $balance"
echo "ok  the same header again: the same answer, and nothing more charged"

stream=true
[ "$(ask)" = 402 ] || fail "no payment for a stream, no 402"
payment=$(node "$tmp/sign.mjs" <"$tmp/body")
[ "$(ask -H "X-Payment: $payment")" = 200 ] || fail "the payment for a stream was not taken"
[ -n "$(header payment-response)" ] || fail "the stream has no receipt of its payment"
[ "$(tail -n 2 "$tmp/body")" = 'data: [DONE]' ] || fail "the stream did not come to its end"
cp "$tmp/body" "$tmp/first"
[ "$(ask -H "X-Payment: $payment")" = 200 ] && cmp -s "$tmp/body" "$tmp/first" || fail "the stream is not given again"
echo "ok  a stream, paid for with its request, and given again"
