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
