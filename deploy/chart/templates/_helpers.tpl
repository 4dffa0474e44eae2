{{- define "hanse.fullname" -}}
{{- if contains "hanse" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-hanse{{ end -}}
{{- end -}}

{{/* Labels of an object; "component" is one of hub, member and agent. */}}
{{- define "hanse.labels" -}}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
chart.hanse.dev/release: {{ .root.Release.Name }}
{{ include "hanse.selector" . }}
{{- end -}}

{{/* Selects pods. Argo CD may overwrite the label instance of the objects that it applies, and not that of templates of pods: what selects
objects selects chart.hanse.dev/release. */}}
{{- define "hanse.selector" -}}
app.kubernetes.io/name: hanse
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "hanse.serviceType" -}}
type: {{ .type }}
{{- with .loadBalancerClass }}
loadBalancerClass: {{ . }}
{{- end }}
{{- with .loadBalancerSourceRanges }}
loadBalancerSourceRanges: {{ toJson . }}
{{- end }}
{{- end -}}

{{/* The names of the Secrets with the state of the member. */}}
{{- define "hanse.stateSecrets" -}}
{{- $name := printf "%s-member" (include "hanse.fullname" .) -}}
{{- $names := list $name (printf "%s-kept" $name) -}}
{{- range list "0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "a" "b" "c" "d" "e" "f" -}}
{{- $names = append $names (printf "%s-nodes-%s" $name .) -}}
{{- end -}}
{{- toJson $names -}}
{{- end -}}

{{- define "hanse.image" -}}
{{ .root.Values.image.registry }}/hanse-{{ .component }}@{{ (get .root.Values .component).image.digest }}
{{- end -}}

{{/* The labels of the nodes of a component. */}}
{{- define "hanse.nodeSelector" -}}
{{ merge (dict) .nodeSelector (dict "kubernetes.io/os" "linux") | toYaml }}
{{- end -}}

{{/* The fields of a pod that all components share. Service links would add variables that the programs read as settings. */}}
{{- define "hanse.pod" -}}
{{- $values := get .root.Values .component -}}
serviceAccountName: {{ include "hanse.fullname" .root }}-{{ .component }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
nodeSelector:
{{ include "hanse.nodeSelector" $values | indent 2 }}
{{- if or $values.tolerations (ne .component "agent") }}
tolerations:
{{- if ne .component "agent" }}
# The member removes the taint: it may not wait for that.
- {key: hanse.dev/agent-not-ready, operator: Exists, effect: NoSchedule}
{{- end }}
{{- with $values.tolerations }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- if $values.affinity }}
affinity:
{{ toYaml $values.affinity | indent 2 }}
{{- else if eq .component "member" }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{- include "hanse.selector" . | nindent 12 }}
{{- end }}
{{- end -}}

{{/* The user of the distroless images. */}}
{{- define "hanse.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "hanse.containerSecurity" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end -}}

{{/* The embedded store. */}}
{{- define "hanse.hubFile" -}}
file:/data/hub/{{ .Values.hub.persistence.file }}
{{- end -}}

{{/* The store of the hub, where it is not the default one, and the key of its authority, where that is in the store. */}}
{{- define "hanse.hubStore" -}}
{{- if .Values.hub.etcd.url }}
- {{ printf "--store=%s" .Values.hub.etcd.url | quote }}
{{- else if ne .Values.hub.persistence.file "hub.redb" }}
- --store={{ include "hanse.hubFile" . }}
{{- end }}
{{- if .Values.hub.keySecret.name }}
- --key-file=/etc/hanse/unlock/{{ .Values.hub.keySecret.key }}
{{- end }}
{{- end -}}

{{- define "hanse.hubStoreMounts" -}}
{{- if .Values.hub.keySecret.name }}
- {name: unlock, mountPath: /etc/hanse/unlock, readOnly: true}
{{- end }}
{{- if and .Values.hub.etcd.url .Values.hub.etcd.secretName }}
- {name: etcd, mountPath: /etc/hanse/etcd, readOnly: true}
{{- end }}
{{- end -}}

{{/* The kubelet gives the files of a Secret, which are mounted read-only, the group fsGroup and the right to read for it, and no other. */}}
{{- define "hanse.hubStoreVolumes" -}}
{{- if .Values.hub.keySecret.name }}
- name: unlock
  secret:
    secretName: {{ .Values.hub.keySecret.name }}
    defaultMode: 0440
{{- end }}
{{- if and .Values.hub.etcd.url .Values.hub.etcd.secretName }}
- name: etcd
  secret:
    secretName: {{ .Values.hub.etcd.secretName }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{- define "hanse.metricsArguments" -}}
{{- if .root.Values.metrics.enabled }}
- --metrics-listen={{ .host }}:{{ .port }}
- --metrics-certificate=/var/run/hanse-metrics/tls.crt
- --metrics-key=/var/run/hanse-metrics/tls.key
- --metrics-token-review
{{- if and .root.Values.metrics.audience (ne .component "agent") }}
- --metrics-audience={{ .root.Values.metrics.audience }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The name that the certificate of metrics is for. The pods of hub and member present the same certificate. */}}
{{- define "hanse.metricsServerName" -}}
{{ .Values.metrics.tls.serverName | default (printf "%s-metrics.%s.svc" (include "hanse.fullname" .) .Release.Namespace) }}
{{- end -}}

{{/* The same for agents: the key is on every node, and must not be good for hub and member. */}}
{{- define "hanse.metricsAgentServerName" -}}
{{ .Values.metrics.tls.agents.serverName | default (printf "%s-metrics-agents.%s.svc" (include "hanse.fullname" .) .Release.Namespace) }}
{{- end -}}

{{- define "hanse.metricsAgentSecret" -}}
{{ .Values.metrics.tls.agents.secretName | default (printf "%s-agents" .Values.metrics.tls.secretName) }}
{{- end -}}

{{- define "hanse.metricsMount" -}}
{{- if .Values.metrics.enabled }}
- {name: metrics-certificate, mountPath: /var/run/hanse-metrics, readOnly: true}
{{- end }}
{{- end -}}

{{- define "hanse.metricsVolume" -}}
{{- if .root.Values.metrics.enabled }}
# A pod starts without it, and serves metrics as soon as it exists.
- name: metrics-certificate
  secret:
    secretName: {{ .secret | default .root.Values.metrics.tls.secretName }}
    items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]
    optional: true
    defaultMode: {{ .mode }}
{{- end }}
{{- end -}}

{{/* Startup may take two minutes: a large store, or a large cluster. "host" is set where health is served on loopback. */}}
{{- define "hanse.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: health{{ with .host }}, host: {{ . }}{{ end }}}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: health{{ with .host }}, host: {{ . }}{{ end }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: health{{ with .host }}, host: {{ . }}{{ end }}}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end -}}

{{- define "hanse.claim" -}}
accessModes: [ReadWriteOnce]
{{- if not (kindIs "invalid" .storageClassName) }}
storageClassName: {{ .storageClassName | quote }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end -}}
