// Reads the body of a 402 from standard input, signs its first offer with WALLET_KEY, prints the X-Payment header.
import { readFileSync } from "node:fs";
import { toHex } from "viem";
import { privateKeyToAccount } from "viem/accounts";

const account = privateKeyToAccount(process.env.WALLET_KEY);
const { x402Version, resource, accepts: [accepted] } = JSON.parse(readFileSync(0, "utf8"));
const { amount, payTo, asset, network, maxTimeoutSeconds, extra: { name, version } } = accepted;
const authorization = {
  from: account.address,
  to: payTo,
  value: amount,
  validAfter: "0",
  validBefore: `${Math.floor(Date.now() / 1000) + maxTimeoutSeconds}`,
  nonce: toHex(crypto.getRandomValues(new Uint8Array(32))),
};
const fields = "address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce"
  .split(",")
  .map((field) => field.split(" "));
const signature = await account.signTypedData({
  domain: { name, version, chainId: Number(network.split(":")[1]), verifyingContract: asset },
  types: { TransferWithAuthorization: fields.map(([type, name]) => ({ type, name })) },
  primaryType: "TransferWithAuthorization",
  message: authorization,
});
const payment = { x402Version, resource, accepted, payload: { signature, authorization } };
console.log(Buffer.from(JSON.stringify(payment)).toString("base64"));
