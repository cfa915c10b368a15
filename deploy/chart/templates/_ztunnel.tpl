{{/* A container of ztunnel; the argument has root, name, and standby for the one
that stands by. Only one of the two binds the pod's ports: whichever is active,
so the probe of the first speaks for both. */}}
{{- define "weft.ztunnel" -}}
{{- $root := .root -}}
- name: {{ .name }}
  image: {{ include "weft.image" (dict "root" $root "name" "ztunnel") }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args:
  - --trust-domain={{ $root.Values.trustDomain }}
  - --cluster-id={{ $root.Values.clusterID }}
  - --network={{ $root.Values.network }}
  - --control-address=weft-control.{{ $root.Release.Namespace }}.svc:15012
  - --same-node={{ eq $root.Values.ztunnel.sameNode "direct" }}
  - --drain={{ $root.Values.ztunnel.drainTimeout }}
  - --log-level={{ $root.Values.logLevel }}
  - --log-format={{ $root.Values.logFormat | default "text" }}
  - --access-log={{ $root.Values.ztunnel.accessLog }}
  {{- if .standby }}
  - --standby
  {{- end }}
  env:
  {{- include "weft.identity" . | nindent 2 }}
  {{- if not .standby }}
  ports:
  - {name: ztunnel-stats, containerPort: 15020}
  - {name: readiness, containerPort: 15021}
  readinessProbe: {httpGet: {path: /healthz/ready, port: readiness}, periodSeconds: 2, failureThreshold: 3}
  {{- end }}
  resources: {{- toYaml $root.Values.ztunnel.resources | nindent 4 }}
  securityContext:
    runAsUser: 0
    runAsGroup: 1337
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    # SYS_ADMIN to enter pods' network namespaces and to bless sockets
    # through a map's descriptor, NET_ADMIN for IP_TRANSPARENT and SO_MARK,
    # NET_RAW to answer name queries from the address that was asked.
    capabilities: {drop: [ALL], add: [SYS_ADMIN, NET_ADMIN, NET_RAW]}
  volumeMounts:
  - {name: weft, mountPath: /var/run/weft}
  - {name: ca-token, mountPath: /var/run/secrets/tokens, readOnly: true}
  - {name: root, mountPath: /var/run/secrets/istio, readOnly: true}
{{- end -}}
