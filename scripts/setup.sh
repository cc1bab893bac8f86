#!/usr/bin/env bash
# Installs what the demo or the tests need beyond Rust, Node and Python; does nothing twice.
#
#   scripts/setup.sh demo    the npm packages of tests/clients: a chain, its USDC, a model server, the clients
#   scripts/setup.sh bench   those, nginx, wrk and PostgreSQL; with BENCH_PEERS=litellm its gateway too
#   scripts/setup.sh test    those of the demo, the Python clients, PostgreSQL, sqlite3, and a chain's state to start tests from
set -euo pipefail
cd "$(dirname "$0")/.."

main() {
  case ${1:-} in
    demo)
      npm_packages
      ;;
    test)
      npm_packages
      chain_state
      python_packages
      programs_for_tests
      ;;
    bench)
      npm_packages
      programs_for_benchmarks
      peers
      ;;
    *) fail "say what for: demo, bench or test" ;;
  esac
}

npm_packages() {
  node -e 'const [a, b] = process.versions.node.split("."); process.exit(a > 20 || (a == 20 && b >= 15) ? 0 : 1)' ||
    fail "Node 20.15 or newer is needed"
  local stamp=tests/clients/node_modules/.installed
  local wanted
  wanted=$(cat tests/clients/package.json tests/clients/package-lock.json | sha256sum)
  done_before "$stamp" "$wanted" && return
  echo "installing the npm packages of tests/clients"
  npm ci --prefix tests/clients --no-audit --no-fund --loglevel=error
  echo "$wanted" >"$stamp"
}

chain_state() {
  local stamp=build/usdc-state.stamp
  local wanted
  wanted=$(cat tests/clients/package-lock.json tests/clients/devchain.mjs tests/clients/anvil.mjs | sha256sum)
  [ -s build/usdc-state.json ] && done_before "$stamp" "$wanted" && return
  echo "deploying USDC and smart wallets for the tests' chains"
  mkdir -p build
  node tests/clients/devchain.mjs state --out build/usdc-state.json
  echo "$wanted" >"$stamp"
}

python_packages() {
  local stamp=build/venv/.installed
  local wanted
  wanted=$(python3 --version && sha256sum <tests/clients/requirements.txt)
  done_before "$stamp" "$wanted" && return
  virtual_environments
  echo "installing the Python packages of tests/clients"
  python3 -m venv --clear build/venv
  build/venv/bin/pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
  echo "$wanted" >"$stamp"
}

# Debian ships Python without the part that makes virtual environments.
virtual_environments() {
  python3 -c 'import ensurepip, venv' 2>/dev/null || install python3-venv
}

programs_for_tests() {
  command -v curl >/dev/null || install curl
  # The backup of an SQLite file is rehearsed with it.
  command -v sqlite3 >/dev/null || install sqlite3
  # A page that uses the gateway is opened in it.
  command -v chromium >/dev/null || install chromium
  postgresql
}

programs_for_benchmarks() {
  command -v wrk >/dev/null || install wrk
  # The binary is where an ordinary user's PATH does not lead.
  PATH=$PATH:/usr/sbin command -v nginx >/dev/null || install nginx-light
  postgresql
}

# Other gateways to measure beside ours: large, and installed for nobody who did not ask.
peers() {
  local peer wanted=${BENCH_PEERS:-}
  for peer in ${wanted//,/ }; do
    case $peer in
      litellm) litellm ;;
      none) ;;
      *) fail "BENCH_PEERS may name litellm, or be none; not $peer" ;;
    esac
  done
}

litellm() {
  local version=1.108.4 stamp=build/bench-litellm/.installed
  done_before "$stamp" "$version" && return
  virtual_environments
  echo "installing LiteLLM's gateway $version"
  python3 -m venv --clear build/bench-litellm
  build/bench-litellm/bin/pip install --quiet --disable-pip-version-check "litellm[proxy]==$version"
  echo "$version" >"$stamp"
}

postgresql() {
  # Tests and benchmarks start servers of their own: they need the binaries, not the service.
  compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || install postgresql
}

done_before() { [ "$(cat "$1" 2>/dev/null)" = "$2" ]; }

install() {
  command -v apt-get >/dev/null || fail "$1 is needed, and there is no apt-get to install it with"
  local root=()
  [ "$(id -u)" = 0 ] || root=(sudo)
  "${root[@]}" apt-get update -qq
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1"
}

fail() {
  echo "setup: $1" >&2
  exit 1
}

main "$@"
