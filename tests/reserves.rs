//! Proof of reserves: what is published is all that the books say at one instant, each wallet finds its balance in
//! it, and nothing in what it is shown can be changed.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use alloy::primitives::U256;
use farebox::attest::Attestor;
use farebox::id::{Entropy, Wallet};
use farebox::ledger::Ending;
use farebox::money::MicroUsdc;
use farebox::reserves::tree::root_of;
use farebox::reserves::{self, Holdings, KEPT, ProofRefused, Publication, VerifiedProof, verify_proof};
use serde_json::{Value, json};

use crate::support::books::{Books, NOW, both, completion, hold, settled, wallet};
use crate::support::eventually;
use crate::support::gateway::{Gateway, ask, members};
use crate::support::wallet::TestWallet;

/// What a treasury holds, on no chain.
fn holdings(micro: i64) -> Holdings {
    Holdings {
        chain_id: 8453,
        asset: wallet(8),
        pay_to: wallet(9),
        balance: MicroUsdc::new(micro),
        block_number: 100,
        block_hash: format!("0x{}", "ab".repeat(32)),
        block_time: NOW,
    }
}

async fn publish(books: &Books) -> Publication {
    reserves::publish(&books.db, &books.clock, &Entropy, holdings(5_000_000)).await.unwrap()
}

async fn attestor(books: &Books) -> Attestor {
    Attestor::load(&books.db, &Entropy, NOW, None, 8453).await.unwrap()
}

/// A wallet's proof as it is answered; `None` where it is in no publication.
async fn proof_text(books: &Books, attestor: &Attestor, of: Wallet) -> Option<String> {
    let latest = reserves::latest(&books.db).await.unwrap().unwrap();
    let proof = reserves::proof_of(&books.db, &latest, of).await.unwrap()?;
    Some(serde_json::to_string(&reserves::proof_body(attestor, &latest, &proof).unwrap()).unwrap())
}

/// So many wallets more, of a few micro-USDC each, written past the program.
async fn fill(books: &Books, count: i64) {
    let statement = if books.is_postgres() {
        "INSERT INTO wallets (address, balance_micro, created_at_ms)
         SELECT '0x' || lpad(n::text, 40, '0'), n % 1000, 0 FROM generate_series(1, $1) AS numbers (n)"
    } else {
        "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < $1)
         INSERT INTO wallets (address, balance_micro, created_at_ms)
         SELECT '0x' || printf('%040d', n), n % 1000, 0 FROM numbers"
    };
    let mut tx = books.db.begin().await.unwrap();
    tx.execute(statement, vec![count.into()]).await.unwrap();
    tx.commit().await.unwrap();
}

async fn balances(books: &Books) -> HashMap<Wallet, i64> {
    let rows = books.db.rows("SELECT address, balance_micro FROM wallets", vec![]).await.unwrap();
    rows.iter().map(|row| (row.wallet("address").unwrap(), row.int("balance_micro").unwrap())).collect()
}

async fn sum(books: &Books) -> i64 {
    books.number("SELECT CAST(COALESCE(SUM(balance_micro), 0) AS BIGINT) AS n FROM wallets").await
}

fn changed(text: &str, change: impl FnOnce(&mut Value)) -> Result<VerifiedProof, ProofRefused> {
    // The order of members is part of how it is written, which a map does not keep.
    let order = ["object", "wallet", "balance_usdc", "salt", "index", "branch", "reserves"];
    let mut proof: Value = serde_json::from_str(text).unwrap();
    change(&mut proof);
    let start = text.find("\"reserves\":").unwrap() + "\"reserves\":".len();
    let published = &text[start..text.len() - 1];
    let node = |node: &Value| format!(r#"{{"hash":{},"sum_usdc":{}}}"#, node["hash"], node["sum_usdc"]);
    let member = |name: &&str| match *name {
        "reserves" => format!("\"reserves\":{published}"),
        "branch" => {
            let nodes: Vec<_> = proof["branch"].as_array().unwrap().iter().map(node).collect();
            format!("\"branch\":[{}]", nodes.join(","))
        }
        name => format!("\"{name}\":{}", proof[name]),
    };
    let members: Vec<_> = order.iter().map(member).collect();
    verify_proof(&format!("{{{}}}", members.join(",")))
}

#[tokio::test]
async fn each_wallet_finds_its_balance_in_trees_of_any_size() {
    both(async |books| {
        let attestor = attestor(books).await;
        assert_eq!(reserves::latest(&books.db).await.unwrap(), None);
        let nobody = publish(books).await;
        assert_eq!((nobody.wallets, nobody.liabilities), (0, MicroUsdc::ZERO));
        assert_eq!(proof_text(books, &attestor, wallet(1)).await, None);
        let mut there = 0;
        for (count, more) in [(1, 0), (2, 0), (3, 0), (3, 253), (3, 254), (3, 700)] {
            for number in there + 1..=count {
                books.credit(wallet(number), i64::from(number) * 1000).await;
            }
            there = there.max(count);
            books.sql("DELETE FROM wallets WHERE address < '0x01'").await.unwrap();
            if more > 0 {
                fill(books, more).await;
            }
            let published = publish(books).await;
            let balances = balances(books).await;
            assert_eq!(usize::try_from(published.wallets).unwrap(), balances.len());
            assert_eq!(published.liabilities.get(), sum(books).await, "what the books owe");
            let mut places = Vec::new();
            for (number, (wallet, balance)) in balances.into_iter().enumerate() {
                let proof = reserves::proof_of(&books.db, &published, wallet).await.unwrap().unwrap();
                assert_eq!((proof.leaf.wallet, proof.leaf.balance.get()), (wallet, balance));
                places.push(proof.index);
                let leaf = proof.leaf.node().unwrap();
                let root = root_of(leaf, proof.index, published.wallets, &proof.branch).unwrap().unwrap();
                assert_eq!((root.hash, root.sum), (published.root, published.liabilities));
                // As it is answered and checked, of some: a signature takes longer than all of the tree.
                if number % 31 == 0 {
                    let text = proof_text(books, &attestor, wallet).await.unwrap();
                    let proof = verify_proof(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
                    assert_eq!((proof.wallet, proof.balance.get()), (wallet, balance));
                    assert_eq!((proof.number, proof.signer), (published.number, attestor.signer()));
                    assert_eq!(proof.root, format!("0x{}", hex::encode(published.root)));
                    assert_eq!(proof.liabilities, published.liabilities);
                }
            }
            places.sort_unstable();
            assert!(places.into_iter().eq(0..published.wallets), "each has a place of its own");
            assert_eq!(proof_text(books, &attestor, wallet(77)).await, None);
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_held_counts_and_debts_are_not_netted() {
    both(async |books| {
        let (ledger, attestor) = (books.ledger("a"), attestor(books).await);
        let payment = books.credit(wallet(1), 1000).await;
        books.credit(wallet(2), 500).await;
        ledger.hold(&hold("req_open", wallet(1), 300)).await.unwrap();
        // A third owes what it has spent of a payment that was undone.
        let undone = books.credit(wallet(3), 400).await;
        let spent = hold("req_spent", wallet(3), 400);
        ledger.hold(&spent).await.unwrap();
        ledger.end(&settled(&spent, completion(100))).await.unwrap();
        let mut tx = books.db.begin().await.unwrap();
        let debt = ledger.reverse(&mut tx, wallet(3), MicroUsdc::new(400), undone).await.unwrap();
        tx.commit().await.unwrap();
        assert_eq!(debt.get(), 72);
        // The first's is in a later block than the holdings are of, the second's is in that block.
        for statement in [
            "UPDATE payments SET asset = '0x0808080808080808080808080808080808080808', block_number = 100,
                                 to_wallet = '0x0909090909090909090909090909090909090909'",
            "UPDATE payments SET block_number = 101 WHERE from_wallet LIKE '0x01%'",
        ] {
            books.sql(statement).await.unwrap();
        }
        books.sql("UPDATE payments SET state = 'reorged' WHERE from_wallet LIKE '0x03%'").await.unwrap();

        let published = publish(books).await;
        assert_eq!(published.liabilities.get(), 1500, "with what is held, and without what is owed to us");
        assert_eq!(published.in_motion.credited_since.get(), 1000, "payment {payment} alone came later");
        for (number, balance) in [(1, 1000), (2, 500), (3, 0)] {
            let text = proof_text(books, &attestor, wallet(number)).await.unwrap();
            assert_eq!(verify_proof(&text).unwrap().balance.get(), balance);
        }
    })
    .await;
}

/// Books and treasury are never looked at in the same moment.
#[tokio::test]
async fn what_is_on_its_way_is_told_apart() {
    both(async |books| {
        let attestor = attestor(books).await;
        books.credit(wallet(1), 100_000).await;
        for (micro, state) in [(1, "mined"), (2, "mined"), (4, "mined"), (10, "finalized"), (20, "finalized"), (40, "finalized")] {
            books.withdraw(wallet(1), micro, state).await;
        }
        for micro in [100, 200, 400] {
            books.credit(wallet(2), micro).await;
        }
        // Of each kind one in time, one in a later block, and one of another treasury.
        for statement in [
            "UPDATE payments SET asset = '0x0808080808080808080808080808080808080808', block_number = 100",
            "UPDATE payments SET block_number = 101 WHERE value_micro IN (2, 20, 200)",
            "UPDATE payments SET from_wallet = '0x0909090909090909090909090909090909090909'
             WHERE kind = 'withdrawal' AND value_micro NOT IN (4, 40)",
            "UPDATE payments SET to_wallet = '0x0909090909090909090909090909090909090909'
             WHERE kind <> 'withdrawal' AND value_micro <> 400",
        ] {
            books.sql(statement).await.unwrap();
        }
        for (id, micro, treasury) in [(91, 1000, 9), (92, 2000, 7)] {
            books.sql_with(
                "INSERT INTO payments (id, chain_id, asset, from_wallet, nonce, to_wallet, value_micro, valid_after,
                                       valid_before, signature, state, seen_block, tx_hash, block_number, log_index,
                                       created_at_ms, updated_at_ms, kind)
                 VALUES ($1, 8453, '0x0808080808080808080808080808080808080808', $2, $3, $4, $5, 0, 0, '0x', 'mined', 1,
                         $3, 90, 0, 0, 0, 'deposit')",
                vec![id.into(), wallet(6).into(), format!("0x{id:064x}").into(), wallet(treasury).into(), micro.into()],
            ).await;
        }
        let published = publish(books).await;
        let in_motion = published.in_motion;
        assert_eq!(in_motion.leaving.unwrap().get(), 1);
        assert_eq!(in_motion.left_since.unwrap().get(), 20);
        assert_eq!(in_motion.credited_since.get(), 200);
        assert_eq!(in_motion.uncredited.unwrap().get(), 1000);
        assert_eq!(published.liabilities.get(), 100_000 - 70 + 700);
        assert_eq!(reserves::latest(&books.db).await.unwrap(), Some(published));
        let proof = serde_json::from_str::<Value>(&proof_text(books, &attestor, wallet(1)).await.unwrap()).unwrap();
        let said = |name: &str| proof["reserves"][name].as_i64().unwrap();
        assert_eq!((said("leaving_usdc"), said("left_since_usdc"), said("uncredited_usdc")), (1, 20, 1000));
        // What was published before any of it was told says nothing of it, as it was signed then.
        books.sql("UPDATE reserves SET leaving_micro = NULL, left_since_micro = NULL, uncredited_micro = NULL").await.unwrap();
        let older = proof_text(books, &attestor, wallet(1)).await.unwrap();
        assert!(!older.contains("leaving") && !older.contains("left_since") && !older.contains("uncredited"), "{older}");
        verify_proof(&older).unwrap();
    })
    .await;
}

#[tokio::test]
async fn not_a_bit_of_a_proof_can_be_changed() {
    let books = Books::sqlite().await;
    let attestor = attestor(&books).await;
    for number in 1..=11 {
        books.credit(wallet(number), i64::from(number) * 1000).await;
    }
    publish(&books).await;
    let text = Arc::new(proof_text(&books, &attestor, wallet(3)).await.unwrap());
    assert_eq!(verify_proof(&text).unwrap().balance.get(), 3000);
    let pretty = text.replace(",\"", " ,\n\t\"").replace("\":", "\" : ");
    assert_eq!(verify_proof(&pretty), verify_proof(&text));
    let seen = AtomicUsize::new(0);
    let part = |odd: usize| {
        for at in (odd..text.len()).step_by(2) {
            for bit in 0..8 {
                let mut bytes = text.as_bytes().to_vec();
                bytes[at] ^= 1 << bit;
                let Ok(changed) = String::from_utf8(bytes) else { continue };
                let verified = verify_proof(&changed);
                assert!(verified.is_err(), "bit {bit} at {at}: {changed}\n{verified:?}");
                seen.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|threads| {
        threads.spawn(|| part(0));
        threads.spawn(|| part(1));
    });
    assert!(seen.into_inner() > text.len() * 6);
}

#[tokio::test]
async fn proofs_that_were_made_up_are_refused() {
    let books = Books::sqlite().await;
    let attestor = attestor(&books).await;
    for number in 1..=6 {
        // All of one balance, so that nothing but whose a leaf is tells them apart.
        books.credit(wallet(number), 1000).await;
    }
    publish(&books).await;
    let text = proof_text(&books, &attestor, wallet(3)).await.unwrap();
    let good = changed(&text, |_| {}).unwrap();
    assert_eq!(good, verify_proof(&text).unwrap());
    let other: Value =
        serde_json::from_str(&proof_text(&books, &attestor, wallet(4)).await.unwrap()).unwrap();
    let refuse = |what: &str, change: &dyn Fn(&mut Value)| {
        let verified = changed(&text, change);
        assert!(verified.is_err(), "{what}: {verified:?}");
    };
    refuse("another wallet's name on the same leaf", &|p| p["wallet"] = other["wallet"].clone());
    refuse("another wallet's place", &|p| p["index"] = other["index"].clone());
    refuse("another wallet's salt", &|p| p["salt"] = other["salt"].clone());
    refuse("another wallet's branch", &|p| p["branch"] = other["branch"].clone());
    refuse("a larger balance", &|p| p["balance_usdc"] = 1001.into());
    refuse("a smaller balance, made up for beside it", &|p| {
        p["balance_usdc"] = 999.into();
        let sum = p["branch"][0]["sum_usdc"].as_i64().unwrap();
        p["branch"][0]["sum_usdc"] = (sum + 1).into();
    });
    refuse("a neighbour below zero", &|p| p["branch"][0]["sum_usdc"] = (-1000).into());
    refuse("a balance below zero", &|p| p["balance_usdc"] = (-1000).into());
    refuse("a sum that overflows", &|p| p["branch"][0]["sum_usdc"] = i64::MAX.into());
    refuse("a sum above the range", &|p| p["branch"][0]["sum_usdc"] = json!(u64::MAX));
    refuse("a node less", &|p| drop(p["branch"].as_array_mut().unwrap().pop()));
    refuse("a node more", &|p| {
        let node = p["branch"][0].clone();
        p["branch"].as_array_mut().unwrap().push(node);
    });
    refuse("a place that is not there", &|p| p["index"] = 6.into());
    refuse("another object", &|p| p["object"] = "reserves".into());

    // Signed by somebody else it verifies as theirs: the signer is what tells.
    let forger = attestor_of(&books, &TestWallet::random()).await;
    let latest = reserves::latest(&books.db).await.unwrap().unwrap();
    let proof = reserves::proof_of(&books.db, &latest, wallet(3)).await.unwrap().unwrap();
    let forged = serde_json::to_string(&reserves::proof_body(&forger, &latest, &proof).unwrap()).unwrap();
    assert_eq!(verify_proof(&forged).unwrap().signer, forger.signer());
    assert_ne!(forger.signer(), good.signer);
}

async fn attestor_of(books: &Books, key: &TestWallet) -> Attestor {
    let secret = secrecy::SecretString::from(key.private_key());
    Attestor::load(&books.db, &Entropy, NOW, Some(&secret), 8453).await.unwrap()
}

/// While money moves, no publication may count any of it twice or not at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_is_of_one_instant() {
    both(async |books| {
        // More than are read at a time, so that others can come between.
        fill(books, 25_000).await;
        books.credit(wallet(1), 1_000_000).await;
        let total = sum(books).await;
        let stop = Arc::new(AtomicBool::new(false));
        let moved = Arc::new(AtomicUsize::new(0));
        let (db, stopped, counted) = (books.db.clone(), stop.clone(), moved.clone());
        // From the first wallets to the last and back, each time in one transaction.
        let mover = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                for statement in [
                    "UPDATE wallets SET balance_micro = balance_micro + CASE address
                         WHEN '0x0000000000000000000000000000000000000999' THEN -900 ELSE 900 END
                     WHERE address IN ('0x0000000000000000000000000000000000000999',
                                       '0x0000000000000000000000000000000000024999')",
                    "UPDATE wallets SET balance_micro = balance_micro + CASE address
                         WHEN '0x0000000000000000000000000000000000000999' THEN 900 ELSE -900 END
                     WHERE address IN ('0x0000000000000000000000000000000000000999',
                                       '0x0000000000000000000000000000000000024999')",
                ] {
                    let mut tx = db.begin().await.unwrap();
                    assert_eq!(tx.execute(statement, vec![]).await.unwrap(), 2);
                    tx.commit().await.unwrap();
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        // And requests are held for and settled at nothing, as they are all the time.
        let (ledger, stopped) = (books.ledger("a"), stop.clone());
        let spender = tokio::spawn(async move {
            let mut ended = 0;
            while !stopped.load(Ordering::Relaxed) {
                let held = hold(Entropy.request_id(NOW.millis()), wallet(1), 300);
                ledger.hold(&held).await.unwrap();
                ledger.end(&Ending::released(held, "upstream_failed")).await.unwrap();
                ended += 1;
            }
            ended
        });
        let before = moved.load(Ordering::Relaxed);
        for _ in 0..6 {
            let published = publish(books).await;
            assert_eq!(published.liabilities.get(), total, "on {}", books.db.kind());
            assert_eq!(published.wallets, 25_001);
        }
        let during = moved.load(Ordering::Relaxed) - before;
        stop.store(true, Ordering::Relaxed);
        mover.await.unwrap();
        assert!(during > 20 && spender.await.unwrap() > 20, "nothing moved meanwhile: {during}");
    })
    .await;
}

#[tokio::test]
async fn only_the_newest_publications_are_kept() {
    both(async |books| {
        let attestor = attestor(books).await;
        fill(books, 600).await;
        // One that was begun and never ended.
        books.sql("INSERT INTO reserves (number, chain_id, asset, pay_to, block_number, block_hash, block_time_ms,
                       reserves_micro, taken_at_ms, wallets, liabilities_micro, credited_since_micro, secret)
                   VALUES (0, 8453, '0x', '0x', 1, '0x', 0, 0, 0, 1, 1, 0, '')").await.unwrap();
        books.sql("INSERT INTO reserves_pages (publication, level, page, first_salt, nodes)
                   VALUES (0, 0, 0, '00', '')").await.unwrap();
        assert_eq!(reserves::latest(&books.db).await.unwrap(), None, "it is not whole");
        let kept = i64::try_from(KEPT).unwrap();
        for number in 1..=kept + 3 {
            books.clock.advance_seconds(86_400);
            assert_eq!(publish(books).await.number, number);
            assert_eq!(reserves::latest(&books.db).await.unwrap().unwrap().number, number);
            let count = books.number("SELECT COUNT(*) AS n FROM reserves").await;
            assert_eq!(count, number.min(kept), "after {number}");
            let pages = books.number("SELECT COUNT(*) AS n FROM reserves_pages").await;
            assert_eq!(pages, number.min(kept) * 4, "three of leaves, and one above");
        }
        assert_eq!(books.number("SELECT MIN(number) AS n FROM reserves").await, 4);
        let address: Wallet = "0x0000000000000000000000000000000000000123".parse().unwrap();
        let first = proof_text(books, &attestor, address).await.unwrap();
        verify_proof(&first).unwrap();
        // The order is another each time, so that places tell nothing.
        publish(books).await;
        let second = proof_text(books, &attestor, address).await.unwrap();
        let salt = |text: &str| serde_json::from_str::<Value>(text).unwrap()["salt"].clone();
        assert_ne!(salt(&first), salt(&second));
    })
    .await;
}

#[tokio::test]
async fn the_operator_publishes_and_each_wallet_checks() {
    let gateway = &Gateway::usual().await;
    gateway.get("/v1/reserves").send().await.error(404, "reserves_not_published");
    let (one, two) = (gateway.customer("3").await, gateway.customer("2").await);
    gateway.get("/v1/reserves/proof").key(&one.key).send().await.error(404, "reserves_not_published");
    gateway.chat(&one, &ask("Hello")).await.expect(200);
    // What was paid is final once blocks have come after it.
    eventually("the payments are final", async || {
        gateway.chain().rpc("evm_mine", json!([])).await;
        let path = format!("/v1/topups/{}", two.wallet.address());
        let list = gateway.get(&path).key(&two.key).send().await.expect(200).json();
        (list["topups"][0]["status"] == "finalized").then_some(list)
    })
    .await;
    let output = gateway.run_with(&["audit", "--publish"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{:?}", String::from_utf8_lossy(&output.stderr));
    assert!(
        said.lines()
            .last()
            .unwrap()
            .starts_with("published reserves 1: 4999989 micro-USDC owed to 2 wallets"),
        "{said}"
    );

    let answer = gateway.get("/v1/reserves").send().await.expect(200);
    let published = answer.json();
    assert_eq!(
        members(&published),
        [
            "asset",
            "block_hash",
            "block_number",
            "block_time",
            "credited_since_usdc",
            "leaving_usdc",
            "left_since_usdc",
            "liabilities_usdc",
            "network",
            "number",
            "object",
            "pay_to",
            "reserves_usdc",
            "root",
            "signature",
            "taken_at",
            "uncredited_usdc",
            "wallets"
        ]
    );
    assert_eq!(published["liabilities_usdc"], 5_000_000 - 11);
    assert_eq!(published["wallets"], 2);
    assert_eq!(published["pay_to"], gateway.setup.pay_to.to_string());
    let verified = farebox::attest::verify(&answer.text()).unwrap();
    let status = gateway.get("/v1/status").send().await.expect(200).json();
    assert_eq!(verified.signer.to_string(), status["receipt_signer"].as_str().unwrap());
    assert_eq!(gateway.get("/v1/reserves").send().await.text(), answer.text(), "it is the same again");

    // The block is there, is final, and the token says the same of it.
    let number = published["block_number"].as_u64().unwrap();
    let block = gateway.chain().rpc("eth_getBlockByNumber", json!([format!("{number:#x}"), false])).await;
    assert_eq!(block["hash"], published["block_hash"]);
    let of = format!("0x70a08231{:0>64}", hex::encode(gateway.setup.pay_to));
    let call = json!([{"to": published["asset"], "data": of}, {"blockHash": published["block_hash"]}]);
    let balance = gateway.chain().rpc("eth_call", call).await;
    let balance = U256::from_str_radix(balance.as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
    assert_eq!(U256::from(published["reserves_usdc"].as_u64().unwrap()), balance);
    assert_eq!(published["reserves_usdc"], 5_000_000);
    let finalized = gateway.chain().rpc("eth_getBlockByNumber", json!(["finalized", false])).await;
    let finalized = u64::from_str_radix(finalized["number"].as_str().unwrap().trim_start_matches("0x"), 16);
    assert!(number <= finalized.unwrap());

    for (customer, balance) in [(&one, 3_000_000 - 11), (&two, 2_000_000)] {
        let text = gateway.get("/v1/reserves/proof").key(&customer.key).send().await.expect(200).text();
        let proof = verify_proof(&text).unwrap();
        assert_eq!(proof.wallet.to_string(), customer.wallet.shown());
        assert_eq!(proof.balance.get(), balance);
        assert_eq!(proof.root, published["root"].as_str().unwrap());

        let file = gateway.directory().join("proof.json");
        fs::write(&file, &text).unwrap();
        let file = file.to_str().unwrap();
        let root = published["root"].as_str().unwrap();
        let signer = status["receipt_signer"].as_str().unwrap();
        let check = |args: &[&str]| {
            let mut command = crate::support::gateway::farebox_command();
            let output = command.arg("verify-proof").arg(file).args(args).current_dir("/").output().unwrap();
            let said = [output.stdout, output.stderr].concat();
            (output.status.code(), String::from_utf8(said).unwrap())
        };
        let (code, said) = check(&["--root", root, "--signer", signer, "--wallet", &customer.wallet.shown()]);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains(&format!("is owed {balance} of 4999989 micro-USDC")), "{said}");
        let (code, said) = check(&["--root", &root.replace(['0', '1'], "2")]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("its root is"), "{said}");
        assert_eq!(check(&["--signer", &TestWallet::random().shown()]).0, Some(1));
        let (code, said) = check(&["--wallet", &TestWallet::random().shown()]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("it is about"), "{said}");
        fs::write(file, text.replace(&format!("\"balance_usdc\":{balance}"), "\"balance_usdc\":1")).unwrap();
        let (code, said) = check(&[]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("does not lead to the root"), "{said}");
    }
    // Who came later, or was never here, is told so.
    let late = gateway.customer("1").await;
    gateway.get("/v1/reserves/proof").key(&late.key).send().await.error(404, "wallet_not_in_reserves");
    let stranger = format!("/v1/reserves/proof{}", gateway.sign_in(&TestWallet::random()).query());
    gateway.get(&stranger).send().await.error(404, "wallet_not_in_reserves");
    gateway.get("/v1/reserves/proof").send().await.error(401, "missing_credentials");
    gateway.audit();
}

#[tokio::test]
async fn what_is_interrupted_leaves_what_was_published_as_it_was() {
    let gateway = &Gateway::usual().await;
    let customer = gateway.customer("3").await;
    assert!(gateway.run_with(&["audit", "--publish"]).status.success());
    let first = gateway.get("/v1/reserves").send().await.expect(200).text();
    for step in ["reserves-begun", "reserves-complete"] {
        let mut command = gateway.command(&["audit", "--publish"]);
        let output = command.env("FAREBOX_CRASH_AT", step).output().unwrap();
        assert!(!output.status.success(), "{step}: {output:?}");
        let now = gateway.get("/v1/reserves").send().await.expect(200);
        assert_eq!(now.text() == first, step == "reserves-begun", "{step}");
        let proof = gateway.get("/v1/reserves/proof").key(&customer.key).send().await.expect(200).text();
        assert_eq!(verify_proof(&proof).unwrap().number, now.json()["number"].as_i64().unwrap());
    }
    assert!(gateway.run_with(&["audit", "--publish"]).status.success());
    assert_eq!(gateway.get("/v1/reserves").send().await.expect(200).json()["number"], 4);
}

#[tokio::test]
async fn nothing_is_published_of_books_that_do_not_agree_or_without_a_chain() {
    both(async |books| {
        books.credit(wallet(1), 1000).await;
        let publish = |books: &Books| {
            crate::support::operator::farebox(books, &["audit", "--publish"]).output().unwrap()
        };
        let output = publish(books);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("the books could not be compared with the chain"), "{said}");
        books.sql("UPDATE wallets SET balance_micro = balance_micro + 1").await.unwrap();
        let output = publish(books);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(books.number("SELECT COUNT(*) AS n FROM reserves").await, 0);
    })
    .await;
}
