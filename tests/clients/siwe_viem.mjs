// Signing in as a dapp does: the siwe and viem packages write the message, a wallet signs it, a key comes back.
//   FAREBOX_URL; WALLET_KEY if the wallet is to be a given one
import { generatePrivateKey, privateKeyToAccount } from "viem/accounts";
import { createSiweMessage, generateSiweNonce } from "viem/siwe";
import { call, check, env, run, same, signIn, url } from "./lib.mjs";

const account = privateKeyToAccount(env("WALLET_KEY", generatePrivateKey()));
const asQuery = (signed) => `?${new URLSearchParams(signed)}`;

run(async () => {
  const signed = await signIn(account);
  const created = await call("POST", "/v1/auth/keys", { body: { ...signed, label: "my-app" } });
  check("siwe: a signed message makes a key, 201", created.status === 201, created);
  check("the key is sk- and 64 hex digits", /^sk-[0-9a-f]{64}$/.test(created.body.key), created.body);
  same("its label", created.body.label, "my-app");
  check("created_at has milliseconds and Z", /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/.test(created.body.created_at));
  const { id, key } = created.body;

  const replayed = await call("POST", "/v1/auth/keys", { body: signed });
  check("the same message again is refused, 401", replayed.status === 401, replayed);
  same("the refusal's type", replayed.body.error.type, "authentication_error");

  const reading = await signIn(account);
  const listed = await call("GET", `/v1/auth/keys${asQuery(reading)}`);
  check("the keys are listed, 200", listed.status === 200, listed);
  check("the new key is among them", listed.body.data.some((row) => row.id === id && row.revoked_at === null), listed.body);
  check("no list shows a key", !JSON.stringify(listed.body).includes(key));
  same("a URL with a signature has Cache-Control", listed.headers.get("cache-control"), "no-store");
  same("and Referrer-Policy", listed.headers.get("referrer-policy"), "no-referrer");
  const again = await call("GET", `/v1/auth/keys${asQuery(reading)}`);
  check("a message used to read reads again, 200", again.status === 200, again);
  const misused = await call("POST", "/v1/auth/keys", { body: reading });
  check("but writes nothing, 401", misused.status === 401, misused);

  const usage = await call("GET", `/v1/usage/${account.address.toLowerCase()}`, { key });
  check("the key reads its wallet's usage, 200", usage.status === 200, usage);
  same("the usage's wallet", usage.body.wallet, account.address);
  const other = await call("GET", "/v1/usage/0x000000000000000000000000000000000000dEaD", { key });
  check("and no other wallet's, 403", other.status === 403, other);

  const message = createSiweMessage({
    domain: new URL(url("/")).host,
    address: account.address,
    uri: url("/"),
    version: "1",
    chainId: 8453,
    nonce: generateSiweNonce(),
  });
  const second = await call("POST", "/v1/auth/keys", {
    body: { message, signature: await account.signMessage({ message }) },
  });
  check("viem/siwe: its message makes a key too, 201", second.status === 201, second);
  same("the label of a key without one", second.body.label, null);

  const elsewhere = await call("POST", "/v1/auth/keys", { body: await signIn(account, { domain: "evil.example" }) });
  check("a message for another site is refused, 401", elsewhere.status === 401, elsewhere);
  const stranger = privateKeyToAccount(generatePrivateKey());
  const forged = { ...(await signIn(account)), signature: (await signIn(stranger)).signature };
  const unproven = await call("POST", "/v1/auth/keys", { body: forged });
  check("a message signed by another wallet is refused, 401", unproven.status === 401, unproven);
  const theirs = await call("DELETE", `/v1/auth/keys/${id}`, { body: await signIn(stranger) });
  check("another wallet cannot revoke the key, 404", theirs.status === 404, theirs);
  for (const time of ["once", "twice"]) {
    const revoked = await call("DELETE", `/v1/auth/keys/${id}`, { body: await signIn(account) });
    check(`revoked ${time}, 200`, revoked.status === 200, revoked);
    same("the answer", revoked.body, { revoked: true });
  }
  const inQuery = await call("DELETE", `/v1/auth/keys/${second.body.id}${asQuery(await signIn(account))}`);
  check("a key is revoked with the message in the query too, 200", inQuery.status === 200, inQuery);
  for (const dead of [key, second.body.key]) {
    const refused = await call("GET", `/v1/usage/${account.address}`, { key: dead });
    check("a revoked key is refused, 401", refused.status === 401, refused);
  }
});
