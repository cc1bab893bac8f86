//! What the API says of itself: `/openapi.json`, the page made of it, and `/llms.txt`; and whether it is true.

use std::process::Command;

use serde_json::json;

use crate::support::gateway::{Gateway, MODEL, Setup};
use crate::support::media::with_media;
use crate::support::tool;
use crate::support::wallet::TestWallet;

#[tokio::test]
async fn the_document_describes_what_is_served() {
    let gateway = Gateway::start_with(with_media(Setup::usual())).await;
    let document = gateway.get("/openapi.json").send().await.expect(200).json();
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["servers"], json!([{"url": gateway.url("")}]));
    for (method, path, _) in farebox::http::route_table() {
        let operation = &document["paths"][path][method.as_str().to_lowercase()];
        assert!(operation["summary"].is_string(), "{method} {path}");
    }
    let page = gateway.get("/docs").send().await.expect(200);
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    let llms = gateway.get("/llms.txt").send().await.expect(200);
    assert_eq!(llms.header("content-type"), Some("text/plain; charset=utf-8"));
    for path in document["paths"].as_object().unwrap().keys() {
        assert!(page.text().contains(path.as_str()) && llms.text().contains(path.as_str()), "{path}");
    }
    assert!(llms.text().starts_with("# Farebox\n") && llms.text().contains(MODEL));
    assert!(llms.text().contains(&format!("{}/v1/topup", gateway.url(""))));
}

/// A gateway that does all that there is.
async fn whole() -> Gateway {
    let treasury = TestWallet::random();
    let setup = Setup {
        pay_to: treasury.address(),
        env: vec![("FAREBOX_TREASURY_KEY".into(), treasury.private_key())],
        payments: "deposits = true".into(),
        ..Setup::usual()
    };
    Gateway::start_with(with_media(setup)).await
}

/// Sends what the document allows and what it does not, and reads whether each answer is one that it names.
fn explore(gateway: &Gateway, headers: &[(&str, &str)]) {
    let python = tool("CLIENTS_PYTHON", "build/venv/bin/python");
    let mut command = Command::new(python.with_file_name("schemathesis"));
    command
        .current_dir(gateway.directory())
        .arg("run")
        .arg(gateway.url("/openapi.json"))
        .args(["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"])
        .args(["--checks", "response_schema_conformance,unsupported_method,allow_header_conformance"])
        .args(["--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--generation-deterministic"])
        .args(["--suppress-health-check", "all", "--warnings", "off", "--request-timeout", "30"])
        .args(["--workers", "2", "--no-color"])
        .env_remove("PYTHONPATH");
    for (name, value) in headers {
        command.args(["--header", &format!("{name}: {value}")]);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    // All but the document itself, which it reads and does not call.
    let tested = format!("Tested: {}", farebox::http::route_table().len() - 1);
    assert!(said.contains(&tested), "not all of it was tested:\n{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_answer_without_a_credential_is_a_documented_one() {
    let gateway = whole().await;
    explore(&gateway, &[]);
    gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_answer_to_a_key_is_a_documented_one() {
    let gateway = whole().await;
    let customer = gateway.customer("5").await;
    explore(&gateway, &[("Authorization", &format!("Bearer {}", customer.key.secret))]);
    gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_answer_to_a_session_is_a_documented_one() {
    let gateway = whole().await;
    let customer = gateway.customer("5").await;
    let signed = gateway.sign_in(&customer.wallet).body();
    let session = gateway.post("/v1/auth/session").json(&signed).send().await.expect(201).json();
    let bearer = format!("Bearer {}", session["session_token"].as_str().unwrap());
    explore(&gateway, &[("Authorization", &bearer)]);
    gateway.audit();
}
