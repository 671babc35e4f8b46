#!/usr/bin/env bash
# Install deploy/automations.yaml, or the file given, on the Prefect server that PREFECT_API_URL names. Safe to repeat: what
# it installed before is replaced. Alarms go to the notification block that RELORA_ALARM_BLOCK names as TYPE/NAME, such
# as slack-webhook/operators; without it they are events in the server's feed.
set -euo pipefail
exec python - "${1:-$(dirname "${BASH_SOURCE[0]}")/automations.yaml}" <<'PYTHON'
import os
import sys
from pathlib import Path

import yaml
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

BODY = (
    "{{ automation.description }}"
    "{% if flow_run %} {{ flow_run.name }}: {{ flow_run.state.message }} {{ flow_run | ui_url }}{% endif %}"
    "{% if event.payload.told %} {{ event.payload.told }}{% endif %}"
)
automations = yaml.safe_load(Path(sys.argv[1]).read_text())["automations"]
with get_client(sync_client=True) as client:
    if block := os.environ.get("RELORA_ALARM_BLOCK"):
        kind, _, name = block.partition("/")
        try:
            found = client.read_block_document_by_name(name, kind)
        except ObjectNotFound:
            sys.exit(f"RELORA_ALARM_BLOCK={block}: the server has no such block. `prefect block ls` shows what it has.")
        tell = {"type": "send-notification", "block_document_id": str(found.id), "subject": "{{ automation.name }}"}
        for each in automations:
            if each["actions"] == [{"type": "do-nothing"}]:
                each["actions"] = [{**tell, "body": BODY}]
    for each in automations:
        for before in client.read_automations_by_name(each["name"]):
            client.delete_automation(before.id)
        client.create_automation(AutomationCore.model_validate(each))
        print(f"installed {each['name']}")
PYTHON
