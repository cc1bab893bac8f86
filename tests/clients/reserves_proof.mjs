// A wallet's proof of reserves, checked by the code of docs/PROOFS.md; and none of it changed anywhere. What is owed to
// several wallets has been published.
//   FAREBOX_URL RPC_URL API_KEY
import { createPublicClient, erc20Abi, http } from "viem";
import { base } from "viem/chains";
import { isDeepStrictEqual } from "node:util";
import { changes, call, check, env, fromTheDocuments, run, same, url } from "./lib.mjs";

run(async () => {
  const { signerOf, isCounted } = await fromTheDocuments("verify.mjs", "reserves.mjs");
  const { receipt_signer: signer } = (await call("GET", "/v1/status")).body;
  const { body: published } = await call("GET", "/v1/reserves");
  same("what is published is signed", await signerOf(published), signer);

  const chain = createPublicClient({ chain: base, transport: http(env("RPC_URL")) });
  const { number } = await chain.getBlock({ blockHash: published.block_hash });
  same("its block is there", Number(number), published.block_number);
  const held = await chain.readContract({
    address: published.asset,
    abi: erc20Abi,
    functionName: "balanceOf",
    args: [published.pay_to],
    blockNumber: number,
  });
  same("and the token says the same of it", Number(held), published.reserves_usdc);

  const text = await (
    await fetch(url("/v1/reserves/proof"), { headers: { authorization: `Bearer ${env("API_KEY")}` } })
  ).text();
  const proof = JSON.parse(text);
  check("the wallet is counted", isCounted(proof), proof);
  check("there are others beside it", proof.branch.length >= 1, proof);
  check("in what was published", isDeepStrictEqual(proof.reserves, published), proof);
  const isGood = async (said) =>
    isCounted(said) && (await signerOf(said.reserves)) === signer && said.reserves.signature.signer === signer;
  // Letters of hex may be of either case to a reader of it.
  const meaning = ({ wallet, salt, branch, reserves: { signature, ...reserves }, ...said }) => ({
    ...said,
    reserves,
    signature: { ...signature, value: signature.value.toLowerCase() },
    hex: [wallet, salt, ...branch.map(({ hash }) => hash)].map((hex) => hex.toLowerCase()),
    branch: branch.map(({ hash, ...node }) => node),
  });
  const { seen, unseen } = await changes(text, isGood, meaning);
  same("no byte of it can be changed unseen", unseen, []);
  check(`${seen} changes were seen`, seen > 1000);
}, 300);
