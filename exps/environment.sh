# Sourced by the scripts that set up a machine: makes .venv at the root of the repository and installs into it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

# install [extras]: install Accessory, with extras like "[test]", unless this very set or more is installed already.
install() {
    local extras="${1:-}" stamp="$VENV/installed.sha256"
    if [ -n "$extras" ] || [ -f "$VENV/installed-with-extras.sha256" ]; then
        stamp="$VENV/installed-with-extras.sha256" extras="[test]"
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        local python
        python="$(command -v python3.11 || command -v python3)" || { echo "Python 3.11 or newer is needed." >&2; exit 1; }
        "$python" -m venv "$VENV"
    fi
    if ! (cd "$ROOT" && sha256sum --check --status "$stamp" 2>/dev/null); then
        echo "== installing into $VENV"
        "$VENV/bin/pip" install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
        "$VENV/bin/pip" install --quiet --disable-pip-version-check -e "$ROOT$extras"
        (cd "$ROOT" && sha256sum requirements.txt pyproject.toml > "$stamp")
    fi
}

# install_llama_cpp: the prebuilt library of llama.cpp (29 MB) that tests load GGUF files with; a failure ends nothing.
install_llama_cpp() {
    local version=3.21.1 platform target="$VENV/llama.cpp"
    case "$(uname -s)-$(uname -m)" in
        Linux-x86_64) platform=linux-x64 ;;
        Linux-aarch64) platform=linux-arm64 ;;
        Darwin-arm64) platform=mac-arm64-metal ;;
        Darwin-x86_64) platform=mac-x64 ;;
        *) platform=none ;;
    esac
    grep -qs "\"version\": \"$version\"" "$target/node_modules/@node-llama-cpp/$platform/package.json" && return
    echo "== installing llama.cpp into $target"
    npm install --prefix "$target" --silent --no-audit --no-fund --no-save --fetch-retries 1 --fetch-timeout 60000 \
        "@node-llama-cpp/$platform@$version" || echo "== llama.cpp is not installed: tests that ask it are skipped" >&2
}
